"""The path of one norm call: check it, choose its backend, run it.

What must be checked, and who can run it, depends on shapes, dtypes and flags only. Both are worked
out once per signature and remembered, so that a repeated call costs one dictionary look-up.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch, higher_order, philox
from . import BACKENDS, fused, reference
from .problem import (
    LayerNormProblem,
    Operands,
    Options,
    describe,
    make_options,
    row_shape,
    sum_dtype,
)


class Plan(NamedTuple):
    """What a signature comes to: its scalars in the kernels' form, and who runs it."""

    options: Options
    backend: ModuleType


class Scalars(NamedTuple):
    """The scalars of a call as the user gave them."""

    normalized_shape: Any
    eps: Any
    rms: bool
    dropout_p: Any = 0.0
    backend: str | None = None


_MAX_PLANS = 4096
_plans: dict[Any, Plan] = {}


def run(
    operands: Operands,
    scalars: Scalars,
    need_sum: bool = False,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> fused.Result:
    """y and, if it is needed or has a place, the sum."""
    operands = _autocast(operands)
    if scalars.dropout_p and operands.rng is None:
        checks.expect_tensor("x", operands.x)
        checks.expect_probability("dropout_p", scalars.dropout_p)
        operands = operands._replace(rng=philox.draw_rng(operands.x.device))
    compiling = torch.compiler.is_compiling()
    plan = _make_plan(operands, scalars) if compiling else _cached_plan(operands, scalars)
    for name, tensor in (("out", out), ("sum_out", sum_out)):
        if tensor is not None:
            _check_out(name, tensor, operands)
    need_sum = need_sum or sum_out is not None
    # torch.func's transforms cannot see into a kernel, but they can into the formula.
    if plan.backend is reference or higher_order.inside_functorch():
        y, h = reference.forward(operands, plan.options)
        result: fused.Result = (y, h if need_sum else None)
    else:
        result = fused.layer_norm(operands, plan.options, need_sum, plan.backend, out, sum_out)
    y, total = result
    if sum_out is not None and total is not None and total is not sum_out:
        total = sum_out.copy_(total)
    if out is not None and y is not out:
        y = out.copy_(y)
    return y, total


def problem_of(operands: Operands, scalars: Scalars) -> LayerNormProblem:
    """The checked description of a call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, operand in zip(("x", "residual"), operands[:2], strict=True):
        if name == "x" or operand is not None:
            checks.expect_tensor(name, operand)
            checks.expect_dtype(name, operand, checks.FLOAT_DTYPES)
    row = row_shape(scalars.normalized_shape)
    options = make_options(
        dims=len(row),
        dtype=sum_dtype(operands),
        eps=scalars.eps,
        rms=scalars.rms,
        dropout_p=scalars.dropout_p,
    )
    return describe(operands, options, row, _needs_grad(operands))


def _cached_plan(operands: Operands, scalars: Scalars) -> Plan:
    try:
        key = (_signature(operands), scalars, _needs_grad(operands))
        plan = _plans.get(key)
    except (AttributeError, TypeError):  # not tensors, or not hashable: let the checks say so
        return _make_plan(operands, scalars)
    if plan is None:
        plan = _make_plan(operands, scalars)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _make_plan(operands: Operands, scalars: Scalars) -> Plan:
    problem = problem_of(operands, scalars)
    return Plan(problem.options, dispatch.select(BACKENDS, problem, scalars.backend))


def _signature(operands: Operands) -> tuple[Any, ...]:
    return tuple([None if x is None else (x.shape, x.dtype, x.device) for x in operands])


def _needs_grad(operands: Operands) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in operands[:4])


def _check_out(name: str, out: Tensor, operands: Operands) -> None:
    checks.expect_shape(name, out, tuple(operands.x.shape), "of `x`")
    checks.expect_dtype(name, out, (sum_dtype(operands),))
    checks.expect_device(name, out, operands.x.device)
    if torch.is_grad_enabled() and (out.requires_grad or _needs_grad(operands)):
        raise ValueError(f"`{name}` must be None where a gradient is wanted, as in torch's functions")


def _autocast(operands: Operands) -> Operands:
    """As torch: CUDA's autocast runs layer norms in float32, the CPU's leaves them alone."""
    x = operands.x
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return operands
    if not torch.is_autocast_enabled("cuda") or not x.is_floating_point():
        return operands
    return Operands(
        *(
            operand.float() if operand is not None and operand.dtype != torch.float64 else operand
            for operand in operands[:4]
        ),
        operands.rng,
    )
