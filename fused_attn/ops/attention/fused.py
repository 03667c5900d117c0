"""One operator pair and one autograd rule for every fused attention backend.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees the operators `fused_attn::attention_forward` and `attention_backward` instead:
the same arguments, the same code behind them; an operator costs some microseconds a call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like

from ...runtime import higher_order
from .. import dispatch
from ..dispatch import OPERATOR, Route
from . import reference
from .problem import AVERAGE, NO_WEIGHTS, Operands, Options


class Settings(NamedTuple):
    """What is wanted of a call, and of whom."""

    weights: int
    need_lse: bool
    token_major: bool  # lay `out` out as (B, Lq, H, Dv) in memory; its shape stays (B, H, Lq, Dv)
    backend: str


@dataclass(frozen=True, slots=True)  # whose attributes are read faster than a named tuple's
class Plan:
    """What the signature of a call comes to; made once, and remembered."""

    options: Options
    settings: Settings
    backend: ModuleType
    needs_grad: bool
    route: Route
    bare: bool  # `bare.run` or, with gradients, `bare.apply` can run the call
    lse_like: Tensor | None  # lse's shape and dtype, if that keeps out and lse for the backward


Result = tuple[Tensor, Tensor | None, Tensor | None]

_OPERANDS = len(Operands._fields)
_SCALARS = _OPERANDS + len(Options._fields)

_OPERANDS_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? key_padding_mask, "
    "Tensor? key_lengths, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? rng"
)
_OPTIONS_SCHEMA = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int causal, SymInt window_left, "
    "SymInt window_right, float scale, float softcap, float dropout_p"
)
_SETTINGS_SCHEMA = "int weights, bool need_lse, bool token_major, str backend"

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(
    f"attention_forward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, {_SETTINGS_SCHEMA}) "
    "-> (Tensor out, Tensor lse, Tensor weights)"
)
_library.define(
    f"attention_backward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, {_SETTINGS_SCHEMA}, "
    "Tensor out, Tensor lse, Tensor? dout, Tensor? dlse, Tensor? dweights, bool[4] needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def attention(operands: Operands, plan: Plan, out: Tensor | None = None) -> Result:
    """Run the plan's backend, with gradients where they are wanted.

    Args:
        out: the tensor to write to, if no gradient is wanted; a new one if None.
    """
    traced = plan.route is OPERATOR
    if not plan.needs_grad:
        if traced:
            return _call_forward(operands, plan.options, plan.settings)
        return _run_forward(operands, plan.options, plan.settings, out)
    return _Attention.apply(*operands[:4], operands[4:], plan, traced)


def _call_forward(operands: Operands, options: Options, settings: Settings) -> Result:
    """Forward through the operator, for those who trace."""
    out, lse, w = torch.ops.fused_attn.attention_forward(*operands, *options, *settings)
    return out, lse if settings.need_lse else None, w if settings.weights else None


def _run_forward(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor | None = None,
    need_lse: bool = False,
) -> Result:
    backend = _backend(settings.backend)
    if out is None:
        out = _empty_out(operands, settings.token_major)
    lse, w = _empty_extras(operands, settings, need_lse)
    if w is None:
        backend.forward(operands, options, out, lse)
    else:
        average = settings.weights == AVERAGE
        backend.forward_with_weights(operands, options, out, lse, w, average)
    return out, lse, w


def _run_backward(
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
        if settings.weights == AVERAGE:
            dweights = dweights / operands.q.shape[1]
    backend = _backend(settings.backend)
    backend.backward(operands, options, out, lse, dout, dlse, dweights, *grads)
    dq, dk, dv, dbias = grads
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    return dq, dk, dv, dbias


@functools.cache
def _backend(name: str) -> Any:
    from . import BACKENDS  # not at import: the tuple imports the backends, and they this module

    for backend in BACKENDS:
        if name == backend.NAME:
            return backend
    raise AssertionError(f"no backend is called {name!r}")


def _empty_out(operands: Operands, token_major: bool) -> Tensor:
    q, v = operands.q, operands.v
    if not token_major and q.shape[3] == v.shape[3]:
        return dense_like(q)
    batch, num_heads, seqlen_q, _ = q.shape
    shape = (batch, num_heads, seqlen_q, v.shape[3])
    if token_major:  # not a transposed view: forward-mode AD treats views differently
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
    if not (settings.need_lse or need_lse) and settings.weights == NO_WEIGHTS:
        return None, None
    q = operands.q
    batch, num_heads, seqlen_q, _ = q.shape
    lse = torch.empty((batch, num_heads, seqlen_q), dtype=statistics_dtype(q), device=q.device)
    w = None
    if settings.weights != NO_WEIGHTS:
        seqlen_k = operands.k.shape[2]
        heads = 1 if settings.weights == AVERAGE else num_heads
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


def _as_tensors(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _split(args: tuple[Any, ...]) -> tuple[Operands, Options, Settings, tuple[Any, ...]]:
    """An operator's flat arguments, put together again, and what follows them."""
    tail = _SCALARS + len(Settings._fields)
    return (
        Operands(*args[:_OPERANDS]),
        Options(*args[_OPERANDS:_SCALARS]),
        Settings(*args[_SCALARS:tail]),
        args[tail:],
    )


def _forward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options, settings, _ = _split(args)
    return _as_tensors(_run_forward(operands, options, settings), operands.q)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, settings, _ = _split(args)
    results = (_empty_out(operands, settings.token_major), *_empty_extras(operands, settings))
    return _as_tensors(results, operands.q)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options, settings, tail = _split(args)
    return _as_tensors(_run_backward(operands, options, settings, *tail), operands.q)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, _, tail = _split(args)
    dq, dk, dv, dbias = _empty_gradients(operands, tail[-1])
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    return _as_tensors((dq, dk, dv, dbias), operands.q)


for _name, _real, _fake in (
    ("attention_forward", _forward_operator, _forward_fake),
    ("attention_backward", _backward_operator, _backward_fake),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)


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
        traced: bool,
    ) -> Result:
        operands = Operands(q, k, v, bias, *masks)
        settings = plan.settings
        # The backward starts from lse, whether or not the call returns it.
        if traced:
            with_lse = settings._replace(need_lse=True)
            out, lse, weights = _call_forward(operands, plan.options, with_lse)
        else:
            out, lse, weights = _run_forward(operands, plan.options, settings, need_lse=True)
        ctx.plan, ctx.traced = plan, traced
        ctx.save_for_backward(*operands, out, lse)
        if higher_order.forward_mode():
            ctx.save_for_forward(*operands)
        ctx.set_materialize_grads(False)
        return out, lse if settings.need_lse else None, weights

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        operands, needs = Operands(*tensors), ctx.needs_input_grad[:4]
        grads = gradients(operands, ctx.plan, ctx.traced, out, lse, grad_outputs, needs)
        return (*grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors[:_OPERANDS])
        formula = _formula(operands, ctx.plan.options, ctx.plan.settings.weights)
        return tuple(higher_order.tangents_through(formula, operands[:4], tangents[:4]))


def gradients(
    operands: Operands,
    plan: Plan,
    traced: bool,
    out: Tensor | None,
    lse: Tensor | None,
    grad_outputs: Sequence[Tensor | None],
    needs: tuple[bool, ...],
) -> Sequence[Tensor | None]:
    """dq, dk, dv and dbias from the gradients of out, lse and weights.

    Where out and lse were not kept, both are None.
    """
    options, settings = plan.options, plan.settings
    if higher_order.backward_needs_formula(grad_outputs):
        formula = _formula(operands, options, settings.weights)
        return higher_order.gradients_through(formula, operands[:4], grad_outputs)
    dout, dlse, dweights = grad_outputs
    if dout is None and dlse is None and dweights is None:
        return (None,) * 4
    if out is None or lse is None:
        out, lse, _ = _call_forward(operands, options, settings._replace(need_lse=True))
    assert lse is not None
    tail = (out, lse, dout, dlse, dweights, needs)
    if not traced and not dispatch.is_traced():
        return _run_backward(operands, options, settings, *tail)
    found = torch.ops.fused_attn.attention_backward(*operands, *options, *settings, *tail)
    return [grad if need else None for grad, need in zip(found, needs, strict=True)]


def _formula(operands: Operands, options: Options, weights: int) -> higher_order.Formula:
    """The reference as a function of the differentiable operands."""

    def formula(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        changed = operands._replace(q=q, k=k, v=v, bias=bias)
        return reference.forward(changed, options, weights)

    return formula
