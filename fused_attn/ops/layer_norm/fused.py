"""The operators and the autograd rule of the norms, shared by all fused backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import higher_order, profiling
from .. import dispatch, operators
from ..dispatch import OPERATOR, Route
from . import reference
from .problem import Operands, Options, compute_dtype, sum_dtype


class Settings(NamedTuple):
    """What is wanted of a call, and of whom."""

    need_sum: bool
    need_statistics: bool  # the backward starts from them
    backend: str


class Backward(NamedTuple):
    """What a backward takes besides the operands."""

    mean: Tensor | None
    rstd: Tensor
    dy: Tensor | None
    dh: Tensor | None
    x_dtype: torch.dtype
    residual_dtype: torch.dtype
    needs: tuple[bool, ...]  # of x, residual, weight and bias


Result = tuple[Tensor, Tensor | None]
Statistics = tuple[Tensor | None, Tensor | None]  # mean (none for RMSNorm) and rstd

_OPERANDS = len(Operands._fields)


def layer_norm(
    operands: Operands,
    options: Options,
    settings: Settings,
    needs_grad: bool,
    route: Route,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Result:
    """y and, if it is needed, the sum; with gradients where they are wanted.

    Args:
        needs_grad: a gradient is wanted.
        route: KERNEL or OPERATOR.
        out, sum_out: the tensors to write y and the sum to, if no gradient is wanted; new ones if
            None.
    """
    if needs_grad:
        # To read the sum is faster than to add up x and residual again, and x can be freed.
        kept = settings.need_sum or operands.residual is not None
        wanted = settings._replace(need_statistics=True, need_sum=kept)
        if route is OPERATOR:
            y, h = _call_forward(operands, options, wanted)
        else:
            y, h = _LayerNorm.apply(*operands, options, wanted)
        return y, h if settings.need_sum else None
    if route is OPERATOR:
        return _call_forward(operands, options, settings)
    return _run_forward(operands, options, settings, out, sum_out)[0]


def _call_forward(operands: Operands, options: Options, settings: Settings) -> Result:
    """Forward through the operator, for those who trace; it has an autograd rule of its own."""
    y, h, _, _ = torch.ops.fused_attn.layer_norm_forward(*operands, *options, *settings)
    return y, h if settings.need_sum else None


def _run_forward(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Result, Statistics]:
    y, h, mean, rstd = _empty_results(operands, options, settings, out, sum_out)
    dispatch.named(__package__, settings.backend).forward(operands, options, y, h, mean, rstd)
    return (y, h), (mean, rstd)


def run_backward(
    operands: Operands,
    options: Options,
    settings: Settings,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor | None,
    dh: Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, residual, weight and bias, those that are needed.

    Where the forward returned the sum (`settings.need_sum`), `operands.x` is that sum.
    """
    if dy is None:
        assert dh is not None
        dy = torch.zeros_like(dh)
    grads = _empty_gradients(operands, x_dtype, residual_dtype, needs)
    backend = dispatch.named(__package__, settings.backend)
    backend.backward(operands, options, settings.need_sum, mean, rstd, dy, dh, *grads)
    return grads


def _empty_results(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    x = operands.x
    dtype = sum_dtype(operands)
    y = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    h = sum_out
    if h is None and settings.need_sum:
        h = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = rstd = None
    if settings.need_statistics:
        rows = x.shape[: x.dim() - options.dims]
        rstd = torch.empty(rows, dtype=compute_dtype(dtype), device=x.device)
        mean = None if options.rms else torch.empty_like(rstd)
    return y, h, mean, rstd


def _empty_gradients(
    operands: Operands, x_dtype: torch.dtype, residual_dtype: torch.dtype, needs: Sequence[bool]
) -> list[Tensor | None]:
    x, _, weight, bias, _ = operands
    return [
        torch.empty(x.shape, dtype=x_dtype, device=x.device) if needs[0] else None,
        torch.empty(x.shape, dtype=residual_dtype, device=x.device) if needs[1] else None,
        *(
            torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if need and parameter is not None
            else None
            for parameter, need in ((weight, needs[2]), (bias, needs[3]))
        ),
    ]


def _forward_operator(
    operands: Operands, options: Options, settings: Settings
) -> tuple[Tensor | None, ...]:
    result, statistics = _run_forward(operands, options, settings)
    return *result, *statistics


operators.define(
    "layer_norm_forward",
    (Operands, Options, Settings),
    ("y", "h", "mean", "rstd"),
    _forward_operator,
    _empty_results,
    lambda operands, options, settings: (
        *reference.forward(operands, options)[: 1 + settings.need_sum],
        *(None,) * (3 - settings.need_sum),
    ),
)
operators.define(
    "layer_norm_backward",
    (Operands, Options, Settings, Backward),
    ("dx", "dresidual", "dweight", "dbias"),
    lambda operands, options, settings, rest: run_backward(operands, options, settings, *rest),
    lambda operands, options, settings, rest: _empty_gradients(operands, *rest[-3:]),
)


def _save(
    ctx: Any,
    operands: Operands,
    options: Options,
    settings: Settings,
    results: tuple[Tensor | None, ...],
) -> None:
    """Where the sum is returned, x and residual are not kept."""
    x, residual = operands.x, operands.residual
    _, h, mean, rstd = results
    ctx.options, ctx.settings = options, settings
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    kept = operands
    if settings.need_sum:
        assert h is not None
        kept = operands._replace(x=h, residual=None)
    ctx.save_for_backward(*kept, None if options.rms else mean, rstd)


def _gradients(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Tensor | None
) -> dict[str, Tensor | None]:
    """By name of the operand, from those of y and the sum."""
    *tensors, mean, rstd = ctx.saved_tensors
    operands, options, settings = Operands(*tensors), ctx.options, ctx.settings
    grads: Sequence[Tensor | None]
    if not settings.need_sum:
        dh = None  # of the empty tensor in its place
    if higher_order.backward_needs_formula((dy, dh)):
        grads = _differentiable_gradients(ctx, operands, dy, dh)
        return dict(zip(Operands._fields, grads, strict=False))
    if dy is None and dh is None:
        return {}
    needs = ctx.needs_input_grad[:4]
    # Without dropout x and residual have one gradient.
    shared = (
        needs[0] and needs[1] and operands.dropout_rng is None and ctx.dtypes[0] == ctx.dtypes[1]
    )
    wanted = (needs[0], needs[1] and not shared, *needs[2:])
    tail = (mean, rstd, dy, dh, *ctx.dtypes, wanted)
    if not operators.by_operator(ctx):
        rest = (operands, options, settings, *tail)
        grads = profiling.call("layer_norm_backward", settings.backend, run_backward, *rest)
    else:
        operator = torch.ops.fused_attn.layer_norm_backward
        grads = operators.only(operator(*operands, *options, *settings, *tail), wanted)
    found = dict(zip(Operands._fields, grads, strict=False))
    if shared:
        found["residual"] = found["x"]
    return found


operators.differentiate("layer_norm_forward", (Operands, Options, Settings), _save, _gradients)


class _LayerNorm(torch.autograd.Function):
    """The operands one by one, then everything else. Results: y and the sum, or None for it.

    Where the sum is returned, the backward starts from it and x and residual are not kept;
    otherwise it adds them up again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rng: Tensor | None,
        options: Options,
        settings: Settings,
    ) -> Result:
        operands = Operands(x, residual, weight, bias, rng)
        (y, h), statistics = _run_forward(operands, options, settings)
        _save(ctx, operands, options, settings, (y, h, *statistics))
        ctx.save_for_forward(*operands)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _gradients(ctx, dy, dh)
        return (*(found.get(field) for field in Operands._fields), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors[:_OPERANDS])
        options, need_sum = ctx.options, ctx.settings.need_sum

        def formula(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Result:
            y, h = reference.forward(
                Operands(x, residual, weight, bias, operands.dropout_rng), options
            )
            return y, h if need_sum else None

        return tuple(higher_order.tangents_through(formula, operands[:4], tangents[:4]))


def _differentiable_gradients(
    ctx: Any, operands: Operands, dy: Tensor | None, dh: Tensor | None
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the reference formula."""
    options = ctx.options
    if not ctx.settings.need_sum:

        def whole(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Sequence[Tensor]:
            moved = Operands(x, residual, weight, bias, operands.dropout_rng)
            return (reference.forward(moved, options)[0],)

        return higher_order.gradients_through(whole, operands[:4], (dy,))

    # The sum that was kept depends on x and residual linearly: go on from its gradient.
    def norm(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        return (reference.normalize(h, weight, bias, options),)

    inputs = (operands.x, operands.weight, operands.bias)
    through_norm, dweight, dbias = higher_order.gradients_through(norm, inputs, (dy,))
    parts = [part for part in (through_norm, dh) if part is not None]
    if not parts:
        return [None, None, dweight, dbias]
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    dx = total
    if operands.dropout_rng is not None:
        dx = reference.dropout(total, operands.dropout_rng, options)
    needs = ctx.needs_input_grad
    return [
        dx.to(ctx.dtypes[0]) if needs[0] else None,
        total.to(ctx.dtypes[1]) if needs[1] else None,
        dweight,
        dbias,
    ]
