"""The path of one norm call: check it, choose its backend, run it.

What must be checked, and who can run it, depends on shapes, dtypes and flags only. Both are worked
out once per signature and remembered, so that a repeated call costs one dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, overlap, philox, profiling
from .. import dispatch
from ..dispatch import FORMULA, Plan
from . import BACKENDS, fused
from .problem import (
    LayerNormProblem,
    Operands,
    describe,
    make_options,
    row_shape,
    sum_dtype,
)


class Scalars(NamedTuple):
    """The scalars of a call as the user gave them."""

    normalized_shape: Any
    eps: Any
    rms: bool
    dropout_p: Any = 0.0
    backend: str | None = None
    need_sum: bool = False


_HALF = (torch.float16, torch.bfloat16)
plans: dispatch.PlanCache[Plan] = dispatch.PlanCache()


def run(
    operands: Operands,
    scalars: Scalars,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> fused.Result:
    """y and, if it is needed, the sum.

    Args:
        out, sum_out: the tensors to write them to; new ones if None.
    """
    if torch._C._is_any_autocast_enabled():
        operands = _autocast(operands)
    if scalars.dropout_p:
        rng = philox.rng_of_call(operands.dropout_rng, scalars.dropout_p, operands.x, "x")
        operands = operands._replace(dropout_rng=rng)
    plan = plans.get(_make_plan, operands, scalars)
    for name, tensor in (("out", out), ("sum_out", sum_out)):
        if tensor is not None:
            _check_out(name, tensor, operands, plan.needs_grad)
    if out is not None and sum_out is not None and overlap.share_memory(out, sum_out):
        raise ValueError("`out` must share no memory with `sum_out`, got tensors that do")
    rest = (plan, operands, scalars.need_sum, out, sum_out)
    return profiling.call("layer_norm", plan.backend.NAME, _execute, *rest)


def _execute(
    plan: Plan, operands: Operands, need_sum: bool, out: Tensor | None, sum_out: Tensor | None
) -> fused.Result:
    """Any call that is checked and planned."""
    if plan.route is not FORMULA:
        settings = fused.Settings(need_sum, False, plan.backend.NAME)
        y, h = fused.layer_norm(
            operands, plan.options, settings, plan.needs_grad, plan.route, out, sum_out
        )
    else:
        y, h = plan.backend.forward(operands, plan.options)
    if sum_out is not None and h is not None and h is not sum_out:
        h = sum_out.copy_(h)
    if out is not None and y is not out:
        y = out.copy_(y)
    return y, h


def problem_of(operands: Operands, scalars: Scalars) -> LayerNormProblem:
    """The checked description of a call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    checks.expect_tensor("x", operands.x)
    if operands.residual is not None:
        checks.expect_tensor("residual", operands.residual)
    row = row_shape(scalars.normalized_shape)
    options = make_options(
        dims=len(row),
        dtype=sum_dtype(operands),
        eps=scalars.eps,
        rms=scalars.rms,
        dropout_p=scalars.dropout_p,
    )
    return describe(operands, options, row)


def smallest(device: torch.device, dtype: torch.dtype) -> LayerNormProblem:
    """The problem of the smallest call."""
    x = torch.zeros(1, 1, dtype=dtype, device=device)
    return problem_of(Operands(x), Scalars(1, 1e-5, False))


def _make_plan(operands: Operands, scalars: Scalars) -> Plan:
    problem = problem_of(operands, scalars)
    backend = dispatch.select(BACKENDS, problem, scalars.backend)
    route = dispatch.route(operands, backend)
    return Plan(problem.options, backend, problem.requires_grad, route)


def _check_out(name: str, out: Tensor, operands: Operands, needs_grad: bool) -> None:
    checks.expect_shape(name, out, tuple(operands.x.shape), "of `x`")
    checks.expect_dtype(name, out, (sum_dtype(operands),))
    checks.expect_device(name, out, operands.x.device)
    overlap.expect_writable(name, out)
    overlap.expect_apart(name, out, operands, in_place=("x", "residual"))
    checks.expect_no_gradient(name, out, needs_grad)


def _autocast(operands: Operands) -> Operands:
    """As torch: CUDA's autocast runs layer norms in float32, the CPU's leaves them alone."""
    x = operands.x
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return operands
    if not torch.is_autocast_enabled("cuda") or not x.is_floating_point():
        return operands
    return Operands(
        *[y.float() if y is not None and y.dtype in _HALF else y for y in operands]  # type: ignore
    )
