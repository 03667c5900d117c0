"""Ring attention (Liu et al. 2023): keys and values go round, queries stay.

Each rank holds one part of the sequence. While its kernel works on the keys that are here, the next
part is already under way. The parts' results are joined by their lse in float32, in the order in
which the parts arrive, which is the same in every run. In the backward the keys go round again, and
their gradients after them, in float32; the kernels start from the out and lse of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.attention import sinks as attention_sinks
from ...ops.attention.fused import statistics_dtype
from ...runtime import sequence
from .call import Call, described, prepared
from .communication import Passing
from .layouts import Group, Order, Piece, expect_ranks, pieces
from .tiles import Band, Keys, Mathematics


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
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
    """`fused_attn.attention` over a sequence of which each rank of `group` has one part.

    With `shard` and `unshard` of this package, on every rank::

        out = ring_attention(*(shard(x, group, dim=2) for x in (q, k, v)), group, causal=True)
        # unshard(out, group, dim=2) is fused_attn.attention(q, k, v, causal=True)

    Gradients of q, k and v are those of the parts; that of `sinks`, which all ranks have, is this
    rank's share of the sum, as any parameter's.

    Args:
        q: (B, H, Lq / n, D), this rank's part. k: (B, Hkv, Lk / n, D). v: (B, Hkv, Lk / n, Dv).
            Parts have one shape on all ranks. With `cu_seqlens` (T / n, heads, head size).
        group: process group, or mesh of one dimension; the default group if None.
        causal, window: as in `attention`, of positions in the whole sequence.
        cu_seqlens: (N + 1,) int32 of a packed batch, of all ranks together and the same on all:
            sequences may begin on one rank and end on another. For queries and keys both.
        document_ids: (B, L / n), or a pair, of this rank's part.
        key_padding_mask: (B, Lk / n) bool, True = visible, of this rank's part.
        sinks, softcap, scale, backend: as in `attention`.
        dropout_p, dropout_rng: as in `attention`. One mask, that of one process with the same
            `dropout_rng`, however many ranks there are; the first rank draws it if None. The bits
            are drawn by torch and the kernels run twice, so that it takes several times as long.
        layout: of q, k, v and out, "bhld" or "blhd".
        order: how the sequence is spread, "contiguous" or "zigzag" (`shard`).
        return_lse: return lse (B, H, Lq / n), float32, as well; differentiable.
        check: let the ranks agree on the call first (512 bytes to each other), so that a mistake on
            one is an error on all. False where a training loop is known to be right.

    Returns:
        out in q's shape (with Dv) and dtype, or (out, lse).

    Raises:
        TypeError, ValueError: an argument is wrong, on this rank or another; all ranks raise.
        UnsupportedError: an argument of `attention` that cannot be cut up, such as `mask`.
        RuntimeError: a rank is gone, or silent for longer than the group's time-out.
    """
    expect_ranks("group", group)
    call = prepared(
        described("ring_attention", locals()), q, k, v, group, check=check, unknown=unknown
    )
    return call.finish(*run(call))


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, Dv) and lse (B, H, Lq) of a call that is checked."""
    with sequence.entered(None):
        return _Ring.apply(call.q, call.k, call.v, call.sinks, _plan(call))


@dataclass(frozen=True)
class _Plan:
    group: dist.ProcessGroup
    order: Order
    band: Band
    mathematics: Mathematics
    padding: Tensor | None
    query_documents: Tensor | None
    key_documents: Tensor | None

    def pieces(self, rows: int, rank: int) -> tuple[Piece, ...]:
        if self.band.sees_all and self.mathematics.dropout is None:
            return (Piece(0, 0, rows),)  # where everything is seen, no position counts
        return pieces(rows, rank, self.group.size(), self.order)

    def after(self, keys: Keys, tag: int) -> Passing:
        return Passing([x for x in keys if x is not None], self.group, tag)

    def arrived(self, passing: Passing) -> Keys:
        parts = iter(passing.wait())
        given = (True, True, self.padding is not None, self.key_documents is not None)
        return Keys(*(next(parts) if there else None for there in given))  # type: ignore[arg-type]


def _plan(call: Call) -> _Plan:
    dropout, documents = call.dropout(), call.documents()
    mathematics = Mathematics(call.scale, call.softcap, dropout, call.backend)
    padding = call.key_padding_mask
    return _Plan(call.group, call.order, call.band(), mathematics, padding, *documents)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        rank, size = plan.group.rank(), plan.group.size()
        shape, wide = (*q.shape[:3], v.shape[3]), statistics_dtype(q)
        total = torch.zeros(shape, dtype=wide, device=q.device)
        lse = torch.full(shape[:3], -torch.inf, dtype=wide, device=q.device)
        keys = Keys(k, v, plan.padding, plan.key_documents)
        mine = plan.pieces(q.shape[2], rank)
        for step in range(size):
            under_way = plan.after(keys, tag=0) if step < size - 1 else None
            there = plan.pieces(k.shape[2], (rank - step) % size)
            for tile in plan.band.tiles(mine, there):
                plan.mathematics.add_forward(tile, q, plan.query_documents, keys, total, lse)
            if under_way is not None:
                keys = plan.arrived(under_way)
        if sinks is not None:
            total, lse, _ = attention_sinks.join(total, lse, None, sinks, in_place=True)
        out = total.to(q.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        with sequence.entered(None):
            rows = (out, lse, dout, dlse)
            dq, dk, dv = _gradients(ctx.plan, q, k, v, rows)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = attention_sinks.gradient(out, lse, dout, dlse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None


def _gradients(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of this rank's part, float32; those of keys follow the keys home."""
    rank, size = plan.group.rank(), plan.group.size()
    wide = rows[1].dtype
    dq = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
    keys = Keys(k, v, plan.padding, plan.key_documents)
    mine = plan.pieces(q.shape[2], rank)
    grads_under_way: Passing | None = None
    dk = dv = dq
    for step in range(size):
        under_way = plan.after(keys, tag=0) if step < size - 1 else None
        dk, dv = (
            torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in keys[:2]
        )
        there = plan.pieces(k.shape[2], (rank - step) % size)
        for tile in plan.band.tiles(mine, there):
            plan.mathematics.backward(tile, q, plan.query_documents, keys, rows, (dq, dk, dv))
        if grads_under_way is not None:  # what the ranks before added to the gradients of these
            for total, found in zip((dk, dv), grads_under_way.wait(), strict=True):
                total += found
        if size > 1:
            grads_under_way = Passing([dk, dv], plan.group, tag=1)
        if under_way is not None:
            keys = plan.arrived(under_way)
    if grads_under_way is not None:
        dk, dv = grads_under_way.wait()
    return dq, dk, dv
