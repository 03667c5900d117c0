"""The operators and the autograd rule of attention, shared by all fused backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like

from ...runtime import higher_order, profiling
from .. import dispatch, operators
from ..dispatch import OPERATOR, Route
from . import reference
from .problem import AVERAGE, BHLD, NO_WEIGHTS, Operands, Options


class Settings(NamedTuple):
    """What is wanted of a call, and of whom."""

    return_weights: int
    return_lse: bool
    layout: str  # of out in memory, BHLD or BLHD; its shape is (B, H, Lq, Dv) here
    backend: str


class Backward(NamedTuple):
    """What a backward takes besides the operands."""

    out: Tensor
    lse: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    dweights: Tensor | None
    needs: tuple[bool, ...]  # of q, k, v and bias


@dataclass(frozen=True, slots=True)  # whose attributes are read faster than a named tuple's
class Plan:
    """What the signature of a call comes to; made once, and remembered."""

    options: Options
    settings: Settings
    backend: ModuleType
    needs_grad: bool
    route: Route
    fast: bool  # `fast_path.run` or, with gradients, `fast_path.apply` can run the call
    lse_like: Tensor | None  # lse's shape and dtype, if that keeps out and lse for the backward
    has_lengths: bool  # whose values are looked at where that costs nothing
    broadcasts: bool  # one batch element of q, or of k and v, stands for all


Result = tuple[Tensor, Tensor | None, Tensor | None]

_OPERANDS = len(Operands._fields)


def attention(operands: Operands, plan: Plan, out: Tensor | None = None) -> Result:
    """Run the plan's backend, with gradients where they are wanted.

    Args:
        out: the tensor to write to, if no gradient is wanted; a new one if None.
    """
    if plan.route is OPERATOR:
        # The operator has an autograd rule of its own. The backward starts from lse.
        return_lse = plan.settings.return_lse or plan.needs_grad
        settings = plan.settings._replace(return_lse=return_lse)
        result, lse, weights = _call_forward(operands, plan.options, settings)
        return result, lse if plan.settings.return_lse else None, weights
    if not plan.needs_grad:
        return _run_forward(operands, plan.options, plan.settings, out)
    return _Attention.apply(*operands[:4], operands[4:], plan)


def _call_forward(operands: Operands, options: Options, settings: Settings) -> Result:
    """Forward through the operator, for those who trace."""
    out, lse, w = torch.ops.fused_attn.attention_forward(*operands, *options, *settings)
    return out, lse if settings.return_lse else None, w if settings.return_weights else None


def _run_forward(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor | None = None,
    need_lse: bool = False,
) -> Result:
    backend = dispatch.named(__package__, settings.backend)
    if out is None:
        out = _empty_out(operands, settings.layout)
    lse, w = _empty_extras(operands, settings, need_lse)
    if w is None:
        backend.forward(operands, options, out, lse)
    else:
        average = settings.return_weights == AVERAGE
        backend.forward_with_weights(operands, options, out, lse, w, average)
    return out, lse, w


def run_backward(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    grads = _empty_gradients(operands, needs)
    if dout is None:
        dout = torch.zeros_like(out)
    if dweights is not None:
        dweights = dweights.to(lse.dtype)
        if settings.return_weights == AVERAGE:
            dweights = dweights / operands.q.shape[1]
    backend = dispatch.named(__package__, settings.backend)
    backend.backward(operands, options, out, lse, dout, dlse, dweights, *grads)
    dq, dk, dv, dbias = grads
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    return dq, dk, dv, dbias


def _empty_out(operands: Operands, layout: str) -> Tensor:
    q, v = operands.q, operands.v
    if layout == BHLD and q.shape[3] == v.shape[3]:
        return dense_like(q)
    batch, num_heads, seqlen_q, _ = q.shape
    shape = (batch, num_heads, seqlen_q, v.shape[3])
    if layout != BHLD:  # not a transposed view: forward-mode AD treats views differently
        return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    return torch.empty(shape, dtype=q.dtype, device=q.device)


def dense_like(q: Tensor) -> Tensor:
    """A new tensor of q's shape and dtype, contiguous; the fastest way, for tiny calls."""
    if q.is_contiguous():
        return empty_like(q)
    return empty_like(q, memory_format=torch.contiguous_format)


def _empty_extras(
    operands: Operands, settings: Settings, need_lse: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    if not (settings.return_lse or need_lse) and settings.return_weights == NO_WEIGHTS:
        return None, None
    q = operands.q
    batch, num_heads, seqlen_q, _ = q.shape
    lse = torch.empty((batch, num_heads, seqlen_q), dtype=statistics_dtype(q), device=q.device)
    w = None
    if settings.return_weights != NO_WEIGHTS:
        seqlen_k = operands.k.shape[2]
        heads = 1 if settings.return_weights == AVERAGE else num_heads
        w = torch.empty((batch, heads, seqlen_q, seqlen_k), dtype=q.dtype, device=q.device)
    return lse, w


def _empty_gradients(operands: Operands, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """dq, dk, dv like their tensors; dbias zero-filled in the statistics' dtype, to be added to."""
    q, k, v, bias = operands[:4]
    grads = [
        empty_like(q) if needs[0] else None,
        empty_like(k) if needs[1] else None,
        empty_like(v) if needs[2] else None,
    ]
    if needs[3] and bias is not None:
        dtype = statistics_dtype(q)
        grads.append(torch.zeros(bias.shape, dtype=dtype, device=bias.device))
    else:
        grads.append(None)
    return grads


def statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward_fake(operands: Operands, options: Options, settings: Settings) -> Result:
    return (_empty_out(operands, settings.layout), *_empty_extras(operands, settings))


def _backward_fake(
    operands: Operands, options: Options, settings: Settings, rest: Backward
) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = _empty_gradients(operands, rest.needs)
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    return dq, dk, dv, dbias


operators.define(
    "attention_forward",
    (Operands, Options, Settings),
    ("out", "lse", "weights"),
    _run_forward,
    _forward_fake,
    lambda operands, options, settings: reference.forward(
        operands, options, settings.return_weights
    ),
)
operators.define(
    "attention_backward",
    (Operands, Options, Settings, Backward),
    ("dq", "dk", "dv", "dbias"),
    lambda operands, options, settings, rest: run_backward(operands, options, settings, *rest),
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    """The differentiable operands one by one, then the other operands and the rest.

    Every argument, saved tensor and attribute of `ctx` costs tenths of a microsecond, which counts
    for tiny calls.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        masks: tuple[Tensor | None, ...],
        plan: Plan,
    ) -> Result:
        operands = Operands(q, k, v, bias, *masks)
        # The backward starts from lse, whether or not the call returns it.
        out, lse, weights = _run_forward(operands, plan.options, plan.settings, need_lse=True)
        ctx.plan = plan
        ctx.save_for_backward(*operands, out, lse)
        if higher_order.forward_mode():
            ctx.save_for_forward(*operands)
        ctx.set_materialize_grads(False)
        return out, lse if plan.settings.return_lse else None, weights

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        operands, needs, plan = Operands(*tensors), ctx.needs_input_grad[:4], ctx.plan
        grads = gradients(operands, plan.options, plan.settings, out, lse, grad_outputs, needs)
        return (*grads, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors[:_OPERANDS])
        formula = _formula(operands, ctx.plan.options, ctx.plan.settings.return_weights)
        return tuple(higher_order.tangents_through(formula, operands[:4], tangents[:4]))


def gradients(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor | None,
    lse: Tensor | None,
    grad_outputs: Sequence[Tensor | None],
    needs: tuple[bool, ...],
    by_operator: bool = False,
) -> Sequence[Tensor | None]:
    """dq, dk, dv and dbias from the gradients of out, lse and weights.

    Where out and lse were not kept, both are None. `by_operator`: the forward went through the
    operator, as the backward must then (`operators.by_operator`).
    """
    if higher_order.backward_needs_formula(grad_outputs):
        formula = _formula(operands, options, settings.return_weights)
        return higher_order.gradients_through(formula, operands[:4], grad_outputs)
    dout, dlse, dweights = grad_outputs
    if dout is None and dlse is None and dweights is None:
        return (None,) * 4
    if out is None or lse is None:
        out, lse, _ = _call_forward(operands, options, settings._replace(return_lse=True))
    assert lse is not None
    tail = (out, lse, dout, dlse, dweights, needs)
    if not (by_operator or dispatch.is_traced()):
        rest = (operands, options, settings, *tail)
        return profiling.call("attention_backward", settings.backend, run_backward, *rest)
    found = torch.ops.fused_attn.attention_backward(*operands, *options, *settings, *tail)
    return operators.only(found, needs)


def _formula(operands: Operands, options: Options, weights: int) -> higher_order.Formula:
    """The reference as a function of the differentiable operands."""

    def formula(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        changed = operands._replace(q=q, k=k, v=v, bias=bias)
        return reference.forward(changed, options, weights)

    return formula


def _save(
    ctx: Any,
    operands: Operands,
    options: Options,
    settings: Settings,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*operands, results[0], results[1])
    ctx.options, ctx.settings = options, settings


def _operator_gradients(ctx: Any, *grad_outputs: Tensor | None) -> dict[str, Tensor | None]:
    *tensors, out, lse = ctx.saved_tensors
    operands, needs = Operands(*tensors), tuple(ctx.needs_input_grad[:4])
    rest = (out, lse, grad_outputs, needs)
    grads = gradients(operands, ctx.options, ctx.settings, *rest, by_operator=True)
    return dict(zip(Operands._fields, grads, strict=False))


operators.differentiate(
    "attention_forward", (Operands, Options, Settings), _save, _operator_gradients
)
