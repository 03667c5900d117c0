"""One operator pair and one autograd rule for every fused backend of bias + activation.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees the operators `fused_attn::bias_activation_forward` and
`bias_activation_backward` instead: the same arguments, the same code behind them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime import higher_order
from .. import dispatch
from ..dispatch import OPERATOR, Route
from . import reference
from .problem import Operands, Options, result_dtype, result_shape

_OPERANDS = len(Operands._fields)
_SCALARS = _OPERANDS + len(Options._fields)

_SCHEMA = (
    "Tensor x, Tensor? bias, Tensor? rng, str activation, bool gated, float dropout_p, str backend"
)

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(f"bias_activation_forward({_SCHEMA}) -> Tensor")
_library.define(
    f"bias_activation_backward({_SCHEMA}, Tensor dy, bool[2] needs) -> (Tensor dx, Tensor dbias)"
)


def bias_activation(
    operands: Operands,
    options: Options,
    backend: str,
    needs_grad: bool,
    route: Route,
    out: Tensor | None = None,
) -> Tensor:
    """y, with gradients where they are wanted.

    Args:
        needs_grad: a gradient is wanted.
        route: KERNEL or OPERATOR.
        out: the tensor to write y to, if no gradient is wanted; a new one if None.
    """
    traced = route is OPERATOR
    if needs_grad:
        return _BiasActivation.apply(*operands, options, backend, traced)
    if not traced:
        return _run_forward(operands, options, backend, out)
    return torch.ops.fused_attn.bias_activation_forward(*operands, *options, backend)


def _run_forward(
    operands: Operands, options: Options, backend: str, out: Tensor | None = None
) -> Tensor:
    y = _empty_result(operands, options) if out is None else out
    _backend(backend).forward(operands, options, y)
    return y


def _run_backward(
    operands: Operands, options: Options, backend: str, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and bias, those that are needed."""
    grads = _empty_gradients(operands, needs)
    _backend(backend).backward(operands, options, dy, *grads)
    return grads


@functools.cache
def _backend(name: str) -> Any:
    from . import BACKENDS  # not at import: the tuple imports the backends, and they this module

    return next(backend for backend in BACKENDS if name == backend.NAME)


def _empty_result(operands: Operands, options: Options) -> Tensor:
    shape = result_shape(operands, options)
    return torch.empty(shape, dtype=result_dtype(operands), device=operands.x.device)


def _empty_gradients(operands: Operands, needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip(operands[:2], needs, strict=True)
    ]


def _as_tensors(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _split(args: tuple[Any, ...]) -> tuple[Operands, Options, str, tuple[Any, ...]]:
    """An operator's flat arguments, put together again, and what follows them."""
    operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
    return operands, options, args[_SCALARS], args[_SCALARS + 1 :]


def _forward_operator(*args: Any) -> Tensor:
    operands, options, backend, _ = _split(args)
    return _run_forward(operands, options, backend)


def _forward_fake(*args: Any) -> Tensor:
    operands, options, _, _ = _split(args)
    return _empty_result(operands, options)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options, backend, tail = _split(args)
    return _as_tensors(_run_backward(operands, options, backend, *tail), operands.x)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, _, tail = _split(args)
    return _as_tensors(_empty_gradients(operands, tail[-1]), operands.x)


for _name, _real, _fake in (
    ("bias_activation_forward", _forward_operator, _forward_fake),
    ("bias_activation_backward", _backward_operator, _backward_fake),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)


class _BiasActivation(torch.autograd.Function):
    """Keeps x and bias, and computes everything else again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        options: Options,
        backend: str,
        traced: bool,
    ) -> Tensor:
        operands = Operands(x, bias, rng)
        ctx.options, ctx.backend, ctx.traced = options, backend, traced
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)
        if traced:
            return torch.ops.fused_attn.bias_activation_forward(*operands, *options, backend)
        return _run_forward(operands, options, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors)
        options, backend, needs = ctx.options, ctx.backend, ctx.needs_input_grad[:2]
        grads: Sequence[Tensor | None]
        if higher_order.backward_needs_formula((dy,)):
            formula = _formula(operands.rng, options)
            grads = higher_order.gradients_through(formula, operands[:2], (dy,))
        elif not ctx.traced and not dispatch.is_traced():
            grads = _run_backward(operands, options, backend, dy, needs)
        else:
            operator = torch.ops.fused_attn.bias_activation_backward
            found = operator(*operands, *options, backend, dy, needs)
            grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (*grads, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        operands = Operands(*ctx.saved_tensors)
        formula = _formula(operands.rng, ctx.options)
        return higher_order.tangents_through(formula, operands[:2], tangents[:2])[0]


def _formula(rng: Tensor | None, options: Options) -> higher_order.Formula:
    """The reference as a function of x and bias."""

    def formula(x: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
        return (reference.forward(Operands(x, bias, rng), options),)

    return formula
