"""Which positions of a sequence are on which rank, and moving tensors there and back.

"contiguous": rank r of n has the r-th of n equal pieces. "zigzag": of 2n pieces rank r has the r-th
from the start and the r-th from the end, so that all ranks have as much to do under a causal mask
(Llama 3's training, Dubey et al. 2024, section 3.3.2, and torch's head-tail order).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...runtime.checks import expect_any_tensor

Order = Literal["contiguous", "zigzag"]
Group = dist.ProcessGroup | DeviceMesh | None
ORDERS = ("contiguous", "zigzag")


class Piece(NamedTuple):
    """Rows that follow each other in the whole sequence and in the rank's part of it."""

    position: int  # of the first row in the whole sequence
    row: int  # of the first row in the part
    length: int


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group that `group` stands for; None is the default one.

    Raises:
        ValueError: a mesh of more than one dimension. RuntimeError: this rank is no member, or
            there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "`group` needs torch.distributed, which is not initialised\n"
            "hint: `torch.distributed.init_process_group(...)`, under `torchrun`"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"`group` must be a mesh of one dimension, got {group}\nhint: `mesh['cp']`, by name"
            )
        return group.get_group()
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, dist.ProcessGroup):
        raise RuntimeError(
            f"`group` must be a process group that this rank (number {dist.get_rank()}) is in, "
            f"got {found!r}"
        )
    return found


def expect_ranks(name: str, group: Group) -> None:
    """Raise ValueError for a group of one among others: who names it meant to cut up something.

    `context_parallel` does not ask: it may well be given one side of a mesh of (4, 1).
    """
    if group is None:
        return
    size, world = group_of(group).size(), dist.get_world_size()
    if size == 1 < world:
        raise ValueError(
            f"`{name}` must have more than one rank, got a group of one in a world of {world}\n"
            "hint: `fused_attn.attention`, where a rank has the whole sequence"
        )


def expect_order(order: object) -> None:
    if order not in ORDERS:
        raise ValueError(f"`order` must be 'contiguous' or 'zigzag', got {order!r}")


def pieces(length: int, rank: int, size: int, order: Order) -> tuple[Piece, ...]:
    """Of the part with `length` rows on `rank` of `size` ranks.

    Raises:
        ValueError: a zigzag part must have an even number of rows.
    """
    if order == "contiguous" or size == 1:
        return (Piece(rank * length, 0, length),)
    if length % 2 != 0:
        raise ValueError(
            f"`order='zigzag'` needs parts of an even length, got {length} rows on each rank\n"
            "hint: pad the sequence to a multiple of twice the group, or `order='contiguous'`"
        )
    half = length // 2
    return Piece(rank * half, 0, half), Piece((2 * size - 1 - rank) * half, half, half)


def positions(
    length: int, rank: int, size: int, order: Order, device: torch.device | None = None
) -> Tensor:
    """(length,) int64: where in the whole sequence the rows of a part are."""
    return torch.cat(
        [
            torch.arange(piece.position, piece.position + piece.length, device=device)
            for piece in pieces(length, rank, size, order)
        ]
    )


def shard(x: Tensor, group: Group = None, *, dim: int = 1, order: Order = "contiguous") -> Tensor:
    """Cut out this rank's part of `x`, which every rank has whole.

    Args:
        x: any tensor whose dimension `dim` is the sequence: (B, L, ...) as it comes.
        group: process group or mesh of one dimension; the default group if None.

    Returns:
        A new tensor with 1/n of the positions.

    Raises:
        ValueError: the sequence does not divide, `dim` or `order` is wrong.
    """
    expect_any_tensor("x", x)
    group = group_of(group)
    expect_order(order)
    rank, size = group.rank(), group.size()
    _expect_dim(x, dim)
    parts = size if order == "contiguous" or size == 1 else 2 * size
    if x.shape[dim] % parts != 0:
        raise ValueError(
            f"`x` must have a sequence (dimension {dim}) that {parts} pieces divide, for {size} "
            f"ranks in {order} order, got {x.shape[dim]} positions\nhint: pad it, and hide the "
            "padding by `key_padding_mask`"
        )
    found = [
        x.narrow(dim, piece.position, piece.length)
        for piece in pieces(x.shape[dim] // size, rank, size, order)
    ]
    return found[0].clone() if len(found) == 1 else torch.cat(found, dim)


@torch.no_grad()
def unshard(x: Tensor, group: Group = None, *, dim: int = 1, order: Order = "contiguous") -> Tensor:
    """Put the whole sequence together on every rank; it carries no gradient.

    Args:
        x: this rank's part, of one shape on all ranks.

    Returns:
        A new tensor with n times the positions.
    """
    expect_any_tensor("x", x)
    group = group_of(group)
    expect_order(order)
    size = group.size()
    _expect_dim(x, dim)
    part = x.detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part, group=group)
    found = [
        (piece.position, part.narrow(dim, piece.row, piece.length))
        for rank, part in enumerate(parts)
        for piece in pieces(x.shape[dim], rank, size, order)
    ]
    return torch.cat([part for _, part in sorted(found, key=lambda pair: pair[0])], dim)


def _expect_dim(x: Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"`dim` must be a dimension of `x`, which has shape {tuple(x.shape)}, got {dim}"
        )
