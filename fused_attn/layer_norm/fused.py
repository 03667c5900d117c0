"""One operator pair and one autograd rule for every fused backend of the norms.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees the operators `fused_attn::layer_norm_forward` and `layer_norm_backward`
instead: the same arguments, the same code behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import higher_order
from . import reference
from .problem import Operands, Options, compute_dtype, sum_dtype

_OPERANDS = len(Operands._fields)
_SCALARS = _OPERANDS + len(Options._fields)

_OPERANDS_SCHEMA = "Tensor? weight, Tensor? bias, Tensor? rng"
_OPTIONS_SCHEMA = "int dims, float eps, bool rms, float dropout_p"

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(
    f"layer_norm_forward(Tensor x, Tensor? residual, {_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, "
    "bool need_sum, bool need_statistics, str backend) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
_library.define(
    f"layer_norm_backward(Tensor? x, Tensor? residual, {_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, "
    "Tensor? h, Tensor? mean, Tensor rstd, Tensor dy, Tensor? dh, ScalarType x_dtype, "
    "ScalarType residual_dtype, bool[4] needs, str backend) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)

Result = tuple[Tensor, Tensor | None]


def layer_norm(
    operands: Operands,
    options: Options,
    need_sum: bool,
    backend: ModuleType,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Result:
    """y and, if it is needed, the sum; with gradients where they are wanted.

    Args:
        out, sum_out: the tensors to write y and the sum to, if no gradient is wanted; new ones if
            None.
    """
    name = backend.NAME
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands[:4]):
        return _LayerNorm.apply(*operands, *options, need_sum, name)
    if not _is_traced(operands):
        y, h, _, _ = _run_forward(operands, options, need_sum, False, name, out, sum_out)
        return y, h
    y, h, _, _ = torch.ops.fused_attn.layer_norm_forward(
        *operands, *options, need_sum, False, name
    )
    return y, h if need_sum else None


def _is_traced(operands: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    plain = (Tensor, torch.nn.Parameter)
    return not all(type(x) in plain for x in operands if x is not None)


def _run_forward(
    operands: Operands,
    options: Options,
    need_sum: bool,
    need_statistics: bool,
    name: str,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    y, h, mean, rstd = _empty_results(
        operands, options, need_sum, need_statistics, out, sum_out
    )
    _backend(name).forward(operands, options, y, h, mean, rstd)
    return y, h, mean, rstd


def _run_backward(
    operands: Operands,
    options: Options,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs: Sequence[bool],
    name: str,
) -> list[Tensor | None]:
    grads = _empty_gradients(operands, dy, x_dtype, residual_dtype, needs)
    _backend(name).backward(operands, options, h, mean, rstd, dy, dh, *grads)
    return grads


def _backend(name: str) -> Any:
    from . import BACKENDS  # not at import: the tuple imports the backends, and they this module

    return next(backend for backend in BACKENDS if backend.NAME == name)


def _empty_results(
    operands: Operands,
    options: Options,
    need_sum: bool,
    need_statistics: bool,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    x = operands.x
    dtype = sum_dtype(operands)
    y = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    h = sum_out
    if h is None and need_sum:
        h = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = rstd = None
    if need_statistics:
        rows = x.shape[: x.dim() - options.dims]
        rstd = torch.empty(rows, dtype=compute_dtype(dtype), device=x.device)
        mean = None if options.rms else torch.empty_like(rstd)
    return y, h, mean, rstd


def _empty_gradients(
    operands: Operands,
    dy: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """In the dtypes of x, residual, weight and bias; None where no gradient is needed."""
    weight, bias = operands.weight, operands.bias
    return [
        torch.empty(dy.shape, dtype=x_dtype, device=dy.device) if needs[0] else None,
        torch.empty(dy.shape, dtype=residual_dtype, device=dy.device) if needs[1] else None,
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        if needs[2] and weight is not None
        else None,
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
        if needs[3] and bias is not None
        else None,
    ]


def _as_tensors(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _forward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
    return _as_tensors(_run_forward(operands, options, *args[_SCALARS:]), operands.x)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
    return _as_tensors(_empty_results(operands, options, *args[_SCALARS:-1]), operands.x)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
    rstd = args[_SCALARS + 2]
    return _as_tensors(_run_backward(operands, options, *args[_SCALARS:]), rstd)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands = Operands(*args[:_OPERANDS])
    _, _, rstd, dy, _, x_dtype, residual_dtype, needs, _ = args[_SCALARS:]
    grads = _empty_gradients(operands, dy, x_dtype, residual_dtype, needs)
    return _as_tensors(grads, rstd)


for _name, _real, _fake in (
    ("layer_norm_forward", _forward_operator, _forward_fake),
    ("layer_norm_backward", _backward_operator, _backward_fake),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)


class _LayerNorm(torch.autograd.Function):
    """Arguments: the operands, the options, need_sum, backend's name. Results: y and the sum.

    Where the sum is returned it is kept for the backward, and x and residual are not; otherwise the
    backward adds them up again.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Result:
        operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_SCALARS])
        need_sum, name = args[_SCALARS:]
        if _is_traced(operands):
            y, h, mean, rstd = torch.ops.fused_attn.layer_norm_forward(
                *operands, *options, need_sum, True, name
            )
            h, mean = h if need_sum else None, None if options.rms else mean
        else:
            y, h, mean, rstd = _run_forward(operands, options, need_sum, True, name)
        ctx.options, ctx.name = options, name
        x, residual = operands.x, operands.residual
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = x.dtype if residual is None else residual.dtype
        kept = operands._replace(x=None, residual=None) if need_sum else operands
        ctx.save_for_backward(*kept, h, mean, rstd)
        ctx.save_for_forward(*operands)
        ctx.set_materialize_grads(False)
        ctx.need_sum = need_sum
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, h, mean, rstd = ctx.saved_tensors
        operands = Operands(*tensors)
        padding = (None,) * (len(ctx.needs_input_grad) - 4)
        if dy is None and dh is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*_differentiable_gradients(ctx, operands, h, dy, dh), *padding)
        if dy is None:
            assert dh is not None
            dy = torch.zeros_like(dh)
        needs = list(ctx.needs_input_grad[:4])
        # Without dropout x and residual have one gradient.
        shared = needs[0] and needs[1] and operands.rng is None
        shared = shared and ctx.x_dtype == ctx.residual_dtype
        wanted = [needs[0], needs[1] and not shared, *needs[2:]]
        arguments = (h, mean, rstd, dy, dh, ctx.x_dtype, ctx.residual_dtype, wanted, ctx.name)
        if _is_traced((*operands, dy, dh)):
            results = torch.ops.fused_attn.layer_norm_backward(
                *operands, *ctx.options, *arguments
            )
            grads = [g if want else None for g, want in zip(results, wanted, strict=True)]
        else:
            grads = _run_backward(operands, ctx.options, *arguments)
        if shared:
            grads[1] = grads[0]
        return (*grads, *padding)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors[:_OPERANDS])
        need_sum = ctx.need_sum

        def formula(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Result:
            moved = Operands(x, residual, weight, bias, operands.rng)
            y, h = reference.forward(moved, ctx.options)
            return y, h if need_sum else None

        return tuple(higher_order.tangents_through(formula, operands[:4], tangents[:4]))


def _differentiable_gradients(
    ctx: Any, operands: Operands, h: Tensor | None, dy: Tensor | None, dh: Tensor | None
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the reference formula."""
    options = ctx.options
    if h is None:

        def whole(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Sequence[Tensor]:
            moved = Operands(x, residual, weight, bias, operands.rng)
            return (reference.forward(moved, options)[0],)

        return higher_order.gradients_through(whole, operands[:4], (dy,))

    # The sum that was kept depends on x and residual linearly: go on from its gradient.
    def norm(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        return (reference.normalize(h, weight, bias, options),)

    inputs = (h, operands.weight, operands.bias)
    through_norm, dweight, dbias = higher_order.gradients_through(norm, inputs, (dy,))
    total = dh if through_norm is None else through_norm
    if dh is not None and through_norm is not None:
        total = through_norm + dh
    if total is None:
        return [None, None, dweight, dbias]
    dx = total
    if operands.rng is not None:
        dx = reference.dropout(total, operands.rng, options)
    needs = ctx.needs_input_grad
    return [
        dx.to(ctx.x_dtype) if needs[0] else None,
        total.to(ctx.residual_dtype) if needs[1] else None,
        dweight,
        dbias,
    ]
