"""`flex_attention` of DTensors: each rank its share of batch and heads, which its functions know.

Queries, keys and values are cut up as the queries are, by batch and by heads; whatever else they
are cut up by is gathered first. What the functions captured every rank has whole; its gradient is
the sum over the ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.nn.attention.flex_attention import BlockMask

BATCH, HEADS = 0, 1


def attend(
    run: Callable[..., Any],
    tensors: tuple[Any, Any, Any],
    score_mod: Callable[..., Tensor] | None,
    block_mask: Any,
) -> Any:
    """What `flex_attention` returns for DTensors.

    Args:
        run: (query, key, value, score_mod, block_mask, around) -> a tensor (B, H, ...), or several;
            `around` is to be put around each captured tensor.
        tensors: query, key, value.

    Raises:
        TypeError, ValueError: not all of them are DTensors of one mesh.
    """
    _expect_one_mesh(tensors)
    q = tensors[0]
    mesh, placements = q.device_mesh, _placements(*tensors[:2])
    local = [_local(x, q.shape[0], placements) for x in tensors]
    sizes, first = compute_local_shape_and_global_offset(q.shape, mesh, placements)
    share = _Share((sizes[0], sizes[1]), (first[0], first[1]))
    groups = [mesh.get_group(n) for n, place in enumerate(placements) if isinstance(place, Shard)]

    def around(captured: Tensor) -> Tensor:
        return _SummedGradient.apply(captured, groups) if captured.requires_grad else captured

    found = run(*local, share.score(score_mod), share.mask(block_mask), around)

    def whole(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        shape = torch.Size((*q.shape[:2], *result.shape[2:]))
        stride = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
        return DTensor.from_local(
            result.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    return whole(found) if isinstance(found, Tensor) else tuple(map(whole, found))


def _expect_one_mesh(tensors: Sequence[Any]) -> None:
    names = ("query", "key", "value")
    first = next(n for n, x in enumerate(tensors) if isinstance(x, DTensor))
    mesh = tensors[first].device_mesh
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, DTensor):
            kind = "a plain tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"`{name}` must be a DTensor as `{names[first]}` is, got {kind}\n"
                f"hint: `DTensor.from_local({name}, mesh)` where every rank has all of it, with "
                f"mesh = {names[first]}.device_mesh = {mesh}"
            )
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"`{name}` must be on the mesh of `{names[first]}`, {mesh}, "
                f"got {tensor.device_mesh}"
            )


def _local(x: DTensor, batch: int, placements: list[Placement]) -> Tensor:
    """A rank's part; of one batch element for all every rank has all of it, and a gradient."""
    for_all = x.shape[0] == 1 != batch
    mine = [Replicate() if for_all and p == Shard(BATCH) else p for p in placements]
    grads = [Partial() if for_all and p == Shard(BATCH) else p for p in placements]
    return x.redistribute(x.device_mesh, mine).to_local(grad_placements=grads)


def _placements(q: DTensor, k: DTensor) -> list[Placement]:
    """Those of the queries, as far as batch and heads are cut up."""
    mesh = q.device_mesh
    placements: list[Placement] = [
        Shard(place.dim) if type(place) is Shard and place.dim in (BATCH, HEADS) else Replicate()
        for place in q.placements
    ]
    by_heads = [n for n, place in enumerate(placements) if place == Shard(HEADS)]
    parts = math.prod(mesh.size(n) for n in by_heads)
    if q.dim() == k.dim() == 4 and q.shape[1] != k.shape[1] and k.shape[1] % parts:
        for n in by_heads:  # a part of the queries would read keys of two parts
            placements[n] = Replicate()
    return placements


@dataclasses.dataclass(frozen=True)
class _Share:
    """A rank's part of batch and heads: how many, from which on."""

    sizes: tuple[int, int]
    first: tuple[int, int]

    def score(self, function: Any) -> Any:
        """The function as the rank calls it."""
        if not callable(function) or self.first == (0, 0):
            return function
        batch, head = self.first
        return lambda score, b, h, q, kv: function(score, b + batch, h + head, q, kv)

    def mask(self, block_mask: Any) -> Any:
        """A mask function, or a BlockMask, as the rank calls it."""
        if not hasattr(block_mask, "kv_num_blocks"):
            return self._mask_mod(block_mask)
        full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        number, indices = (None if x is None else self._part(x) for x in full)
        return BlockMask.from_kv_blocks(
            self._part(block_mask.kv_num_blocks),
            self._part(block_mask.kv_indices),
            number,
            indices,
            BLOCK_SIZE=block_mask.BLOCK_SIZE,
            mask_mod=self._mask_mod(block_mask.mask_mod),
            seq_lengths=block_mask.seq_lengths,
        )

    def _mask_mod(self, function: Any) -> Any:
        if not callable(function) or self.first == (0, 0):
            return function
        batch, head = self.first
        return lambda b, h, q, kv: function(b + batch, h + head, q, kv)

    def _part(self, lists: Tensor) -> Tensor:
        """The rank's of the lists of all; one for all stays."""
        for dim, (size, first) in enumerate(zip(self.sizes, self.first, strict=True)):
            if lists.shape[dim] > 1:
                lists = lists.narrow(dim, first, size)
        return lists


class _SummedGradient(torch.autograd.Function):
    """A tensor that all ranks have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: list[Any]) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        for group in ctx.groups:
            dist.all_reduce(total, group=group)
        return total, None
