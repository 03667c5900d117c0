"""Any mask and any change of scores, block of queries by block of queries; never (Lq, Lk) at once.

Where the function only adds to the score (or caps it first), the kernels of `attention` do the
rest: what it adds is their bias, what its mask shows their mask, one block of queries at a time.
Else the formula is computed on the block's scores. The backward computes each block's scores again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.attention.api import attention
from ..ops.attention.backward import attention_backward
from ..runtime import autocast, higher_order
from . import compiled
from .blocks import ALL, NOTHING, Row
from .call import Call


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, Dv) and lse (B, H, Lq), differentiable in q, k, v and what is captured."""
    captured = call.captured()
    with autocast.off(q.device):  # a block's products are of the dtype that it gives them
        if higher_order.needs_formula() or higher_order.forward_mode():
            return formula(call, q, k, v, captured)
        return _Flex.apply(call, q, k, v, *captured)


def formula(
    call: Call, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, for derivatives of any order; it keeps all scores."""
    found = [_by_formula(call, row, q, k, v, captured) for row in call.rows]
    if not found:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    return torch.cat([out for out, _, _ in found], 2), torch.cat([lse for _, lse, _ in found], 2)


def max_scores(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """The largest score of each query (B, H, Lq), -inf where it sees no key."""
    captured = call.captured()
    rows = []
    with torch.no_grad():
        for row in call.rows:
            scores, visible = _scores(call, row, _raw(call, row, q, k), captured)
            rows.append(_peak(_hidden(scores, visible)))
    return torch.cat(rows, 2)


class _Flex(torch.autograd.Function):
    """All blocks one after the other."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = torch.empty(q.shape[:3], dtype=_wide(q), device=q.device)
        ran = compiled.forward(call, q, k, v, captured, out, lse)
        for row in () if ran else call.rows:
            if call.adds:
                found = _by_kernel(call, row, q, k, v, captured)
            else:
                found = _by_formula(call, row, q, k, v, captured)[:2]
            out[:, :, row.queries], lse[:, :, row.queries] = found
        ctx.save_for_backward(q, k, v, out, lse, *captured)
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *captured = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        dout, dlse = grads
        if higher_order.backward_needs_formula((dout, dlse)):

            def whole(q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> tuple[Tensor, Tensor]:
                return formula(call, q, k, v, captured)

            return (None, *higher_order.gradients_through(whole, (q, k, v, *captured), grads))
        dout = torch.zeros_like(out) if dout is None else dout
        found = compiled.gradients(call, (q, k, v), captured, (out, lse, dout, dlse), needs)
        if found is not None:
            return (None, *found)
        sums = _Sums((q, k, v, *captured), needs)
        gradients = _kernel_gradients if call.adds else _formula_gradients
        with autocast.off(q.device):
            for row in call.rows:
                given = tuple(
                    None if x is None else x[:, :, row.queries] for x in (out, lse, dout, dlse)
                )
                gradients(call, row, (q, k, v), captured, given, sums)
        return (None, *sums.results())


class _Sums:
    """Gradients of (q, k, v, *captured), added up block by block in one order."""

    def __init__(self, inputs: tuple[Tensor, ...], needs: Sequence[bool]) -> None:
        self.needs = needs
        self._inputs = inputs
        self._sums = [
            torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            if need
            else None
            for x, need in zip(inputs, needs, strict=True)
        ]

    def add(self, number: int, place: Any, gradient: Tensor | None) -> None:
        total = self._sums[number]
        if total is None or gradient is None:
            return
        if isinstance(place, Tensor):
            total.index_add_(2, place, gradient.to(total.dtype))
        elif place is None:
            total += gradient
        else:
            total[:, :, place] += gradient

    def wanted(self, number: int) -> list[int]:
        """Which of the first `number` captured tensors want a gradient."""
        return [n for n in range(number) if self.needs[3 + n]]

    def results(self) -> list[Tensor | None]:
        return [
            None if total is None else total.to(x.dtype)
            for total, x in zip(self._sums, self._inputs, strict=True)
        ]


# --- a block by the kernels ---


def _options(call: Call, row: Row, q: Tensor, captured: Sequence[Tensor]) -> dict[str, Any]:
    """Bias and mask of a block, as `attention` takes them."""
    mine, masks = call.split(captured)
    options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
    if call.score is not None:
        inputs = _inputs(row, q, q.new_zeros((), dtype=_wide(q)))
        added = call.score.evaluate(inputs, mine).to(_wide(q))
        options["bias"] = _four(added)
    visible = _visible(call, row, q, masks)
    if visible is not None:
        options["mask"] = _four(visible)
    return options


def _by_kernel(
    call: Call, row: Row, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    options = _options(call, row, q, captured)
    out, lse = attention(q[:, :, row.queries], row.of(k), row.of(v), return_lse=True, **options)
    return out, lse


def _kernel_gradients(
    call: Call,
    row: Row,
    qkv: tuple[Tensor, Tensor, Tensor],
    captured: Sequence[Tensor],
    given: tuple[Any, ...],
    sums: _Sums,
) -> None:
    q, k, v = qkv
    out, lse, dout, dlse = given
    points, masks, wanted = _points(call, captured, sums)
    with torch.enable_grad():
        options = _options(call, row, q, [*points, *masks])
    bias = options.get("bias")
    needs = [name for name, need in zip("qkv", sums.needs, strict=False) if need]
    if bias is not None and bias.requires_grad:
        needs.append("bias")
    fixed: Any = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
    found = attention_backward(
        dout,
        q[:, :, row.queries],
        row.of(k),
        row.of(v),
        out,
        lse.contiguous(),
        dlse=dlse,
        needs=needs,
        **fixed,
    )
    for number, (place, gradient) in enumerate(
        zip((row.queries, row.keys, row.keys), found[:3], strict=True)
    ):
        sums.add(number, place, gradient)
    if found.dbias is not None and bias is not None:
        _add_captured(bias, found.dbias, points, wanted, sums)


def _points(
    call: Call, captured: Sequence[Tensor], sums: _Sums
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """What the change of scores captured, to be differentiated; the mask's; which are wanted."""
    mine, masks = call.split(captured)
    wanted = sums.wanted(len(mine))
    points = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(mine)]
    return points, masks, wanted


def _add_captured(
    result: Tensor, gradient: Tensor, points: list[Tensor], wanted: list[int], sums: _Sums
) -> None:
    inputs = [points[n] for n in wanted]
    found = torch.autograd.grad(result, inputs, gradient, allow_unused=True)
    for n, each in zip(wanted, found, strict=True):
        sums.add(3 + n, None, each)


# --- a block by the formula ---


def _by_formula(
    call: Call, row: Row, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and probabilities of a block."""
    scores, visible = _scores(call, row, _raw(call, row, q, k), captured)
    scores = _hidden(scores, visible)
    peak = _peak(scores).detach()[..., None]
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    weights = weights / total
    lse = torch.where(nothing, -torch.inf, peak + torch.log(total))[..., 0]
    values = _unseen_as_zero(row.of(v).to(_wide(q)), visible, q.shape[1])
    return _per_group(weights, values).to(q.dtype), lse, weights


def _formula_gradients(
    call: Call,
    row: Row,
    qkv: tuple[Tensor, Tensor, Tensor],
    captured: Sequence[Tensor],
    given: tuple[Any, ...],
    sums: _Sums,
) -> None:
    q, k, v = qkv
    out, lse, dout, dlse = given
    wide = _wide(q)
    points, masks, wanted = _points(call, captured, sums)
    raw = _raw(call, row, q, k).requires_grad_()
    with torch.enable_grad():
        scores, visible = _scores(call, row, raw, [*points, *masks])
        scores = scores.expand(raw.shape)
    safe = torch.where(lse == -torch.inf, 0.0, lse)[..., None]
    weights = torch.exp(_hidden(scores.detach(), visible) - safe)
    keys, values = row.of(k).to(wide), _unseen_as_zero(row.of(v).to(wide), visible, q.shape[1])
    dout = dout.to(wide)
    dweights = _per_group(dout, values.transpose(-2, -1))
    delta = (dout * out.to(wide)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    dscores = weights * (dweights - delta)
    if scores.requires_grad:
        inputs = [raw, *(points[n] for n in wanted)]
        draw, *found = torch.autograd.grad(scores, inputs, dscores, allow_unused=True)
        for n, each in zip(wanted, found, strict=True):
            sums.add(3 + n, None, each)
    else:
        draw = None
    if draw is None:
        draw = torch.zeros_like(raw)
    heads = k.shape[1]
    queries = q[:, :, row.queries].to(wide)
    sums.add(0, row.queries, _per_group(draw, keys) * call.scale)
    sums.add(1, row.keys, _over_group(draw, queries, heads) * call.scale)
    sums.add(2, row.keys, _over_group(weights, dout, heads))


def _raw(call: Call, row: Row, q: Tensor, k: Tensor) -> Tensor:
    """scale * q kᵀ of a block, (B, H, rows, keys)."""
    wide = _wide(q)
    keys = row.of(k).to(wide).transpose(-2, -1)
    return _per_group(q[:, :, row.queries].to(wide), keys) * call.scale


def _scores(
    call: Call, row: Row, raw: Tensor, captured: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Changed scores, and which pairs are seen (None: all)."""
    mine, masks = call.split(captured)
    scores = raw
    if call.score is not None:
        scores = call.score.evaluate(_inputs(row, raw, raw), mine).to(raw.dtype)
    return scores, _visible(call, row, raw, masks)


def _peak(scores: Tensor) -> Tensor:
    """The largest of each row, -inf where it has none."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.amax(-1)


def _hidden(scores: Tensor, visible: Tensor | None) -> Tensor:
    return scores if visible is None else torch.where(visible, scores, -torch.inf)


def _visible(call: Call, row: Row, like: Tensor, captured: list[Tensor]) -> Tensor | None:
    """Broadcastable to (B, H, rows, keys): True = seen; None: everything is."""
    kinds = row.kinds
    if call.mask is None:
        return None if kinds is None or bool((kinds != NOTHING).all()) else kinds != NOTHING
    if kinds is not None and bool((kinds == ALL).all()):
        return None
    visible = call.mask.evaluate(_inputs(row, like, None), captured)
    if kinds is None:
        return visible
    return torch.where(kinds == ALL, True, visible & (kinds != NOTHING))


def _inputs(row: Row, like: Tensor, score: Tensor | None) -> dict[str, Tensor]:
    """What the functions are called with; `like` (B, H, ...) gives sizes and device."""
    batch, heads = like.shape[:2]
    device = like.device
    queries = torch.arange(row.queries.start, row.queries.stop, device=device)
    inputs = {
        "b": torch.arange(batch, device=device)[:, None, None, None],
        "h": torch.arange(heads, device=device)[:, None, None],
        "q_idx": queries[:, None],
        "kv_idx": row.key_numbers(device)[None, :],
    }
    return inputs if score is None else {"score": score, **inputs}


def _unseen_as_zero(values: Tensor, visible: Tensor | None, heads: int) -> Tensor:
    """Values without those that no query of the block sees, which may be NaN."""
    if visible is None:
        return values
    if not higher_order.needs_formula() and bool(values.isfinite().all()):
        return values
    seen = _four(visible).any(-2)
    seen = seen.expand(values.shape[0], heads, values.shape[2])
    seen = seen.unflatten(1, (values.shape[1], -1)).any(2)
    return torch.where(seen[..., None], values, 0.0)


def _four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_group(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, n, a) times y (B, Hkv, a, c) of the head's group."""
    groups = y.shape[1]
    wide = x.unflatten(1, (groups, -1)).flatten(2, 3)
    return (wide @ y).unflatten(2, (-1, x.shape[2])).flatten(1, 2)


def _over_group(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """xᵀ y of (B, H, n, a) and (B, H, n, c), summed over the heads of a group: (B, Hkv, a, c)."""
    x, y = (each.unflatten(1, (groups, -1)).flatten(2, 3) for each in (x, y))
    return x.transpose(-2, -1) @ y
