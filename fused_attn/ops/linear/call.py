"""The path of one call: check it, choose its backend, run it.

What must be checked, and who can run it, depends on shapes, dtypes and flags only. Both are worked
out once per signature and remembered, so that a repeated call costs one dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import autocast, philox, profiling
from .. import dispatch
from ..dispatch import FORMULA, Plan
from . import BACKENDS, fused
from .problem import LinearProblem, Operands, describe, make_options

_autocast_enabled = torch._C._is_any_autocast_enabled


class Scalars(NamedTuple):
    """The scalars of a call as the user gave them."""

    backend: str | None = None
    activation: Any = None
    gated: Any = False
    dropout_p: Any = 0.0


plans: dispatch.PlanCache[Plan] = dispatch.PlanCache()


def run(operands: Operands, scalars: Scalars) -> Tensor:
    """y, new."""
    if scalars.dropout_p:
        rng = philox.rng_of_call(operands.dropout_rng, scalars.dropout_p, operands.x, "x")
        operands = operands._replace(dropout_rng=rng)
    if _autocast_enabled():
        operands = _autocast(operands)
    plan = plans.get(_make_plan, operands, scalars)
    return profiling.call("linear", plan.backend.NAME, _execute, plan, operands)


def _execute(plan: Plan, operands: Operands) -> Tensor:
    """Any call that is checked and planned."""
    if plan.route is FORMULA:
        return plan.backend.forward(operands, plan.options)
    name = plan.backend.NAME
    return fused.linear(operands, plan.options, name, plan.needs_grad, plan.route)


def _autocast(operands: Operands) -> Operands:
    """Everything in the autocast dtype, as torch does for its own linear."""
    dtype = autocast.dtype_for(operands.x)
    if dtype is None:
        return operands
    converted = (t.to(dtype) if isinstance(t, Tensor) else t for t in operands[:4])
    x, weight, bias, residual = converted
    return Operands(x, weight, bias, residual, operands.dropout_rng)  # type: ignore[arg-type]


def problem_of(operands: Operands, scalars: Scalars) -> LinearProblem:
    """The checked description of a call.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what was expected, what came.
    """
    options = make_options(
        activation=scalars.activation, gated=scalars.gated, dropout_p=scalars.dropout_p
    )
    return describe(operands, options)


def smallest(device: torch.device, dtype: torch.dtype) -> LinearProblem:
    """The problem of the smallest call."""
    x = torch.zeros(1, 1, dtype=dtype, device=device)
    return problem_of(Operands(x, x), Scalars())


def _make_plan(operands: Operands, scalars: Scalars) -> Plan:
    problem = problem_of(operands, scalars)
    backend = dispatch.select(BACKENDS, problem, scalars.backend)
    route = dispatch.route(operands, backend)
    return Plan(problem.options, backend, problem.requires_grad, route)
