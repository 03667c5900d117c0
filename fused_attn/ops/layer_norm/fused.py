"""One operator pair and one autograd rule for every fused backend of the norms.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees the operators `fused_attn::layer_norm_forward` and `layer_norm_backward`
instead: the same arguments, the same code behind them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import higher_order
from .. import dispatch
from ..dispatch import OPERATOR, Route
from . import reference
from .problem import Operands, Options, compute_dtype, sum_dtype


class Settings(NamedTuple):
    """What is wanted of a call, and of whom."""

    need_sum: bool
    need_statistics: bool  # the backward starts from them
    backend: str


Result = tuple[Tensor, Tensor | None]
Statistics = tuple[Tensor | None, Tensor | None]  # mean (none for RMSNorm) and rstd

_OPERANDS = len(Operands._fields)
_SCALARS = _OPERANDS + len(Options._fields)

_OPERANDS_SCHEMA = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng"
_OPTIONS_SCHEMA = "int dims, float eps, bool rms, float dropout_p"
_SETTINGS_SCHEMA = "bool need_sum, bool need_statistics, str backend"

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(
    f"layer_norm_forward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, {_SETTINGS_SCHEMA}) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
_library.define(
    f"layer_norm_backward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, {_SETTINGS_SCHEMA}, "
    "Tensor? mean, Tensor rstd, Tensor? dy, Tensor? dh, ScalarType x_dtype, "
    "ScalarType residual_dtype, bool[4] needs) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


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
    traced = route is OPERATOR
    if needs_grad:
        # To read the sum is faster than to add up x and residual again, and x can be freed.
        kept = settings.need_sum or operands.residual is not None
        kept_settings = settings._replace(need_statistics=True, need_sum=kept)
        y, h = _LayerNorm.apply(*operands, options, kept_settings, traced)
        return y, h if settings.need_sum else None
    if not traced:
        return _run_forward(operands, options, settings, out, sum_out)[0]
    return _call_forward(operands, options, settings)[0]


def _call_forward(
    operands: Operands, options: Options, settings: Settings
) -> tuple[Result, Statistics]:
    """Forward through the operator, for those who trace."""
    y, h, mean, rstd = torch.ops.fused_attn.layer_norm_forward(*operands, *options, *settings)
    needed = settings.need_statistics
    statistics = mean if needed and not options.rms else None, rstd if needed else None
    return (y, h if settings.need_sum else None), statistics


def _run_forward(
    operands: Operands,
    options: Options,
    settings: Settings,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Result, Statistics]:
    y, h, mean, rstd = _empty_results(operands, options, settings, out, sum_out)
    _backend(settings.backend).forward(operands, options, y, h, mean, rstd)
    return (y, h), (mean, rstd)


def _run_backward(
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
    backend = _backend(settings.backend)
    backend.backward(operands, options, settings.need_sum, mean, rstd, dy, dh, *grads)
    return grads


@functools.cache
def _backend(name: str) -> Any:
    from . import BACKENDS  # not at import: the tuple imports the backends, and they this module

    return next(backend for backend in BACKENDS if name == backend.NAME)


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


def _as_tensors(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
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
    result, statistics = _run_forward(operands, options, settings)
    return _as_tensors((*result, *statistics), operands.x)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, options, settings, _ = _split(args)
    return _as_tensors(_empty_results(operands, options, settings), operands.x)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options, settings, tail = _split(args)
    return _as_tensors(_run_backward(operands, options, settings, *tail), operands.x)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _, _, tail = _split(args)
    return _as_tensors(_empty_gradients(operands, *tail[-3:]), operands.x)


for _name, _real, _fake in (
    ("layer_norm_forward", _forward_operator, _forward_fake),
    ("layer_norm_backward", _backward_operator, _backward_fake),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)


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
        traced: bool,
    ) -> Result:
        operands = Operands(x, residual, weight, bias, rng)
        run = _call_forward if traced else _run_forward
        (y, h), statistics = run(operands, options, settings)
        ctx.options, ctx.settings, ctx.traced = options, settings, traced
        ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
        kept = operands if h is None else operands._replace(x=h, residual=None)
        ctx.save_for_backward(*kept, *statistics)
        ctx.save_for_forward(*operands)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, mean, rstd = ctx.saved_tensors
        operands = Operands(*tensors)
        options, settings = ctx.options, ctx.settings
        if higher_order.backward_needs_formula((dy, dh)):
            return (*_differentiable_gradients(ctx, operands, dy, dh), None, None, None, None)
        if dy is None and dh is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[:4]
        # Without dropout x and residual have one gradient.
        shared = needs[0] and needs[1] and operands.rng is None and ctx.dtypes[0] == ctx.dtypes[1]
        wanted = (needs[0], needs[1] and not shared, *needs[2:])
        tail = (mean, rstd, dy, dh, *ctx.dtypes, wanted)
        if not ctx.traced and not dispatch.is_traced():
            grads = _run_backward(operands, options, settings, *tail)
        else:
            found = torch.ops.fused_attn.layer_norm_backward(*operands, *options, *settings, *tail)
            grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        if shared:
            grads[1] = grads[0]
        return (*grads, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors[:_OPERANDS])
        options, need_sum = ctx.options, ctx.settings.need_sum

        def formula(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Result:
            y, h = reference.forward(Operands(x, residual, weight, bias, operands.rng), options)
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
            moved = Operands(x, residual, weight, bias, operands.rng)
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
    if operands.rng is not None:
        dx = reference.dropout(total, operands.rng, options)
    needs = ctx.needs_input_grad
    return [
        dx.to(ctx.dtypes[0]) if needs[0] else None,
        total.to(ctx.dtypes[1]) if needs[1] else None,
        dweight,
        dbias,
    ]
