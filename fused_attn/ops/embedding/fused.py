"""One operator pair and one autograd rule for every fused backend of embedding.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees the operators `fused_attn::embedding_forward` and
`embedding_backward` instead: the same arguments, the same code behind them.
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
    "Tensor tokens, Tensor weight, Tensor? table, Tensor? positions, Tensor? rng, float scale, "
    "SymInt offset, SymInt padding_idx, float dropout_p, str backend"
)

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(f"embedding_forward({_SCHEMA}) -> Tensor")
_library.define(
    f"embedding_backward({_SCHEMA}, Tensor dy, bool[2] needs) -> (Tensor dweight, Tensor dtable)"
)


def embedding(
    operands: Operands,
    options: Options,
    backend: str,
    needs_grad: bool,
    route: Route,
) -> Tensor:
    """y, with gradients where they are wanted.

    Args:
        needs_grad: a gradient is wanted.
        route: KERNEL or OPERATOR.
    """
    traced = route is OPERATOR
    if needs_grad:
        return _Embedding.apply(*operands, options, backend, traced)
    if not traced:
        return _run_forward(operands, options, backend)
    return torch.ops.fused_attn.embedding_forward(*operands, *options, backend)


def _run_forward(operands: Operands, options: Options, backend: str) -> Tensor:
    y = _empty_result(operands)
    _backend(backend).forward(operands, options, y)
    return y


def _run_backward(
    operands: Operands, options: Options, backend: str, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of weight and table, those that are needed."""
    grads = _empty_gradients(operands, needs)
    _backend(backend).backward(operands, options, dy, *grads)
    return grads


@functools.cache
def _backend(name: str) -> Any:
    from . import BACKENDS  # not at import: the tuple imports the backends, and they this module

    return next(backend for backend in BACKENDS if name == backend.NAME)


def _empty_result(operands: Operands) -> Tensor:
    shape, dtype = result_shape(operands), result_dtype(operands)
    return torch.empty(shape, dtype=dtype, device=operands.weight.device)


def _empty_gradients(operands: Operands, needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip((operands.weight, operands.table), needs, strict=True)
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
    operands, _, _, _ = _split(args)
    return _empty_result(operands)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options, backend, tail = _split(args)
    return _as_tensors(_run_backward(operands, options, backend, *tail), operands.weight)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, _, tail = _split(args)
    return _as_tensors(_empty_gradients(operands, tail[-1]), operands.weight)


for _name, _real, _fake in (
    ("embedding_forward", _forward_operator, _forward_fake),
    ("embedding_backward", _backward_operator, _backward_fake),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)


class _Embedding(torch.autograd.Function):
    """Keeps the operands alone; the dropout is drawn again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        table: Tensor | None,
        positions: Tensor | None,
        rng: Tensor | None,
        options: Options,
        backend: str,
        traced: bool,
    ) -> Tensor:
        operands = Operands(tokens, weight, table, positions, rng)
        ctx.options, ctx.backend, ctx.traced = options, backend, traced
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)
        if traced:
            return torch.ops.fused_attn.embedding_forward(*operands, *options, backend)
        return _run_forward(operands, options, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors)
        options, backend, needs = ctx.options, ctx.backend, ctx.needs_input_grad[1:3]
        grads: Sequence[Tensor | None]
        if higher_order.backward_needs_formula((dy,)):
            formula, inputs = _formula(operands, options), operands[1:3]
            grads = higher_order.gradients_through(formula, inputs, (dy,))
        elif not ctx.traced and not dispatch.is_traced():
            grads = _run_backward(operands, options, backend, dy, needs)
        else:
            operator = torch.ops.fused_attn.embedding_backward
            found = operator(*operands, *options, backend, dy, needs)
            grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (None, *grads, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        operands = Operands(*ctx.saved_tensors)
        formula = _formula(operands, ctx.options)
        return higher_order.tangents_through(formula, operands[1:3], tangents[1:3])[0]


def _formula(operands: Operands, options: Options) -> higher_order.Formula:
    """The reference as a function of weight and table."""

    def formula(weight: Tensor, table: Tensor | None) -> Sequence[Tensor]:
        return (reference.forward(operands._replace(weight=weight, table=table), options),)

    return formula
