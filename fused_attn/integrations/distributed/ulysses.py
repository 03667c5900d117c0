"""Ulysses (Jacobs et al. 2023): each rank changes its part of the positions for some of the heads.

One all-to-all gives every rank all positions of 1/n of the heads, where attention is the usual one;
another takes the output back. With `ring` the positions are those of a ring's part, and attention
goes round the ring (Fang and Zhao 2024, "USP").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ring as rings
from .call import Call, Heads, described, prepared
from .communication import all_to_all, gather
from .layouts import Group, Order, expect_ranks, group_of, pieces


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    ring: Group = None,
    causal: Any = False,
    window: tuple[int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Any = None,
    key_padding_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    layout: Any = "bhld",
    order: Order = "contiguous",
    return_lse: bool = False,
    check: bool = True,
    backend: str | None = None,
    **unknown: Any,
) -> Any:
    """As `ring_attention`, by exchanging positions for heads.

    Args:
        q, k, v: this rank's parts, as in `ring_attention`. n must divide H; and Hkv, or else Hkv
            must divide n, and keys and values are sent n / Hkv times.
        group: process group, or mesh of one dimension; the default group if None.
        ring: another group, for both ways at once: the sequence is spread over the ring first
            (in `order`), and each of its parts over `group` (contiguous). All ranks of `group` are
            at the same place of their rings.
        causal, ..., backend: as in `ring_attention`.

    Returns:
        out in q's shape (with Dv) and dtype, or (out, lse).

    Raises:
        TypeError, ValueError, UnsupportedError, RuntimeError: as `ring_attention`, and ValueError
            where heads do not divide.
    """
    expect_ranks("group", group)
    expect_ranks("ring", ring)
    call = prepared(
        described("ulysses_attention", locals()),
        q,
        k,
        v,
        group,
        check=check,
        unknown=unknown,
        divides=expect_heads,
        across=ring,
    )
    return call.finish(*run(call, None if ring is None else group_of(ring)))


def run(call: Call, ring: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, Dv) and, if it is asked for, lse (B, H, Lq) of a call that is checked."""
    group, size = call.group, call.group.size()
    order = call.order if ring is None else "contiguous"
    kv_heads = call.k.shape[1]
    k, v = call.k, call.v
    if kv_heads % size != 0:  # each rank gets the one head that its queries read
        k, v = (x.repeat_interleave(size // kv_heads, dim=1) for x in (k, v))
    mine = _positions_for_heads(call.q, group, order)
    heads = mine.shape[1]
    inner = dataclasses.replace(
        call,
        q=mine,
        k=_positions_for_heads(k, group, order),
        v=_positions_for_heads(v, group, order),
        group=_alone() if ring is None else ring,
        heads=Heads(group.rank() * heads, call.q.shape[1]),
        sinks=None if call.sinks is None else call.sinks.chunk(size)[group.rank()],
        key_padding_mask=_all_rows(call.key_padding_mask, group, order),
        document_ids=_all_documents(call, order),
    )
    out, lse = rings.run(inner)
    if call.return_lse:  # else it stays where it is: nobody looks at it
        lse = _heads_for_positions(lse[..., None], group, order)[..., 0]
    return _heads_for_positions(out, group, order), lse


class _Alone:
    """A group of one, which sends nothing."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def _alone() -> Any:
    return _Alone()


def expect_heads(q: Tensor, k: Tensor, size: int) -> None:
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % size != 0:
        raise ValueError(
            f"`q` must have a number of heads that the {size} ranks of `group` divide, got {heads}"
            "\nhint: `ring_attention`, which cuts up positions alone"
        )
    if kv_heads % size != 0 and size % kv_heads != 0:
        raise ValueError(
            f"`k` must have a number of heads that the {size} ranks of `group` divide, or that "
            f"divides them, got {kv_heads}\nhint: `ring_attention`, which cuts up positions alone"
        )


def _positions_for_heads(x: Tensor, group: dist.ProcessGroup, order: Order) -> Tensor:
    """(B, H, L / n, D) -> (B, H / n, L, D), positions in their order."""
    size = group.size()
    if size == 1:
        return x
    batch, heads, length, width = x.shape
    by_rank = x.reshape(batch, size, heads // size, length, width).transpose(0, 1)
    parts = all_to_all(by_rank, group)  # piece s: the positions of rank s
    return torch.cat(
        [parts[s].narrow(2, row, n) for s, row, n in _in_order(length, size, order)], 2
    )


def _heads_for_positions(x: Tensor, group: dist.ProcessGroup, order: Order) -> Tensor:
    """(B, H / n, L, D) -> (B, H, L / n, D)."""
    size = group.size()
    if size == 1:
        return x
    length = x.shape[2] // size
    parts = torch.stack(
        [
            torch.cat(
                [x.narrow(2, p.position, p.length) for p in pieces(length, s, size, order)], 2
            )
            for s in range(size)
        ]
    )
    return torch.cat(all_to_all(parts, group).unbind(), 1)  # piece s: the heads of rank s


def _in_order(length: int, size: int, order: Order) -> list[tuple[int, int, int]]:
    """(rank, first row, rows) of all pieces in the order of their positions."""
    found = [(p, s) for s in range(size) for p in pieces(length, s, size, order)]
    return [(s, p.row, p.length) for p, s in sorted(found)]


def _all_rows(x: Tensor | None, group: dist.ProcessGroup, order: Order) -> Tensor | None:
    """(B, L / n) of each rank -> (B, L)."""
    if x is None or group.size() == 1:
        return x
    parts = gather(x.to(torch.int64), group)
    places = _in_order(x.shape[1], group.size(), order)
    return torch.cat([parts[s].narrow(1, row, n) for s, row, n in places], 1).to(x.dtype)


def _all_documents(call: Call, order: Order) -> tuple[Tensor, Tensor] | None:
    if call.document_ids is None:
        return None
    queries, keys = (_all_rows(x, call.group, order) for x in call.document_ids)
    assert queries is not None
    assert keys is not None
    return queries, keys
