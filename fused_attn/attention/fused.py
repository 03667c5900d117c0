"""One operator pair and one autograd rule for every fused attention backend.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees the operators `fused_attn::attention_forward` and `attention_backward` instead:
the same arguments, the same code behind them; an operator costs some microseconds a call.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import higher_order
from . import reference
from .problem import AVERAGE, NO_WEIGHTS, Operands, Options

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

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(
    f"attention_forward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, int weights, bool need_lse, "
    "bool token_major, str backend) -> (Tensor out, Tensor lse, Tensor weights)"
)
_library.define(
    f"attention_backward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, Tensor out, Tensor lse, "
    "Tensor? dout, Tensor? dlse, Tensor? dweights, bool[4] needs, int weights, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def attention(
    operands: Operands,
    options: Options,
    weights: int,
    need_lse: bool,
    token_major: bool,
    backend: ModuleType,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run `backend`, with gradients where they are wanted.

    Args:
        token_major: lay `out` out as (B, Lq, H, Dv) in memory; its shape stays (B, H, Lq, Dv).
        out: the tensor to write to, if no gradient is wanted; a new one if None.
    """
    name = backend.NAME
    if torch.is_grad_enabled() and _requires_grad(operands):
        return _Attention.apply(*operands, *options, weights, True, token_major, name)
    if not _is_traced(operands):
        return _run_forward(operands, options, weights, need_lse, token_major, name, out)
    results = torch.ops.fused_attn.attention_forward(
        *operands, *options, weights, need_lse, token_major, name
    )
    return _as_optional(results, need_lse, weights)


def _requires_grad(operands: Operands) -> bool:
    bias = operands.bias
    return (
        operands.q.requires_grad
        or operands.k.requires_grad
        or operands.v.requires_grad
        or (bias is not None and bias.requires_grad)
    )


def _is_traced(operands: Operands) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    plain = (Tensor, torch.nn.Parameter)
    return not all(type(x) in plain for x in operands if x is not None)


def _run_forward(
    operands: Operands,
    options: Options,
    weights: int,
    need_lse: bool,
    token_major: bool,
    name: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    backend = _backend(name)
    if out is None:
        out = _empty_out(operands, token_major)
    lse, w = _empty_extras(operands, weights, need_lse)
    backend.forward(operands, options, out, lse)
    if w is not None:
        backend.weights(operands, options, lse, w, weights == AVERAGE)
    return out, lse, w


def _run_backward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    needs: tuple[bool, ...],
    weights: int,
    name: str,
) -> tuple[Tensor | None, ...]:
    grads = _empty_gradients(operands, needs)
    if dout is None:
        dout = torch.zeros_like(out)
    if dweights is not None:
        dweights = dweights.to(lse.dtype)
        if weights == AVERAGE:
            dweights = dweights / operands.q.shape[1]
    _backend(name).backward(operands, options, out, lse, dout, dlse, dweights, *grads)
    dq, dk, dv, dbias = grads
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    return dq, dk, dv, dbias


def _backend(name: str) -> Any:
    from . import BACKENDS  # not at import: the tuple imports the backends, and they this module

    return next(backend for backend in BACKENDS if name == backend.NAME)


def _empty_out(operands: Operands, token_major: bool) -> Tensor:
    q = operands.q
    batch, num_heads, seqlen_q, _ = q.shape
    head_dim_v = operands.v.shape[3]
    if token_major:
        shape = (batch, seqlen_q, num_heads, head_dim_v)
        return torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    shape = (batch, num_heads, seqlen_q, head_dim_v)
    return torch.empty(shape, dtype=q.dtype, device=q.device)


def _empty_extras(
    operands: Operands, weights: int, need_lse: bool
) -> tuple[Tensor | None, Tensor | None]:
    q = operands.q
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = operands.k.shape[2]
    lse = w = None
    if need_lse or weights != NO_WEIGHTS:
        lse = torch.empty((batch, num_heads, seqlen_q), dtype=_statistics_dtype(q), device=q.device)
    if weights != NO_WEIGHTS:
        heads = 1 if weights == AVERAGE else num_heads
        w = torch.empty((batch, heads, seqlen_q, seqlen_k), dtype=q.dtype, device=q.device)
    return lse, w


def _empty_gradients(operands: Operands, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """dq, dk, dv like their tensors; dbias zero-filled in the statistics' dtype, to be added to."""
    grads: list[Tensor | None] = [
        torch.empty_like(x) if need else None
        for x, need in zip(operands[:3], needs[:3], strict=True)
    ]
    bias = operands.bias
    if needs[3] and bias is not None:
        grads.append(
            torch.zeros(bias.shape, dtype=_statistics_dtype(operands.q), device=bias.device)
        )
    else:
        grads.append(None)
    return grads


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _as_tensors(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _as_optional(
    results: tuple[Tensor, Tensor, Tensor], need_lse: bool, weights: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    out, lse, w = results
    return out, lse if need_lse else None, w if weights else None


def _forward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
    return _as_tensors(_run_forward(operands, options, *args[_SCALARS:]), operands.q)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands = Operands(*args[:_OPERANDS])
    weights, need_lse, token_major, _ = args[_SCALARS:]
    results = (_empty_out(operands, token_major), *_empty_extras(operands, weights, need_lse))
    return _as_tensors(results, operands.q)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
    return _as_tensors(_run_backward(operands, options, *args[_SCALARS:]), operands.q)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands = Operands(*args[:_OPERANDS])
    needs = args[_SCALARS + 5]
    dq, dk, dv, dbias = _empty_gradients(operands, needs)
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
    """Arguments: the operands, the options, weights, need_lse, token_major, backend's name."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
        ctx.settings = args[_SCALARS:]
        ctx.options = options
        if _is_traced(operands):
            results = torch.ops.fused_attn.attention_forward(*args)
            out, lse, weights = _as_optional(results, True, ctx.settings[0])
        else:
            out, lse, weights = _run_forward(operands, options, *ctx.settings)
        ctx.save_for_backward(*operands, out, lse)
        ctx.save_for_forward(*operands, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse, weights

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse, dweights = grad_outputs
        *tensors, out, lse = ctx.saved_tensors
        operands = Operands(*tensors)
        weights, name = ctx.settings[0], ctx.settings[3]
        padding = (None,) * (len(ctx.needs_input_grad) - 4)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            formula = _formula(operands, ctx.options, weights)
            return (
                *higher_order.gradients_through(formula, operands[:4], grad_outputs),
                *padding,
            )
        if dout is None and dlse is None and dweights is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = tuple(ctx.needs_input_grad[:4])
        tail = (out, lse, dout, dlse, dweights, needs, weights, name)
        if _is_traced(operands):
            grads = torch.ops.fused_attn.attention_backward(*operands, *ctx.options, *tail)
            grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        else:
            grads = _run_backward(operands, ctx.options, *tail)
        return (*grads, *padding)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors[:_OPERANDS])
        formula = _formula(operands, ctx.options, ctx.settings[0])
        return tuple(higher_order.tangents_through(formula, operands[:4], tangents[:4]))


def _formula(operands: Operands, options: Options, weights: int) -> higher_order.Formula:
    """The reference as a function of the differentiable operands."""

    def formula(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return reference.forward(operands._replace(q=q, k=k, v=v, bias=bias), options, weights)

    return formula
