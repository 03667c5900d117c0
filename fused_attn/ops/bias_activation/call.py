"""The path of one call: check it, choose its backend, run it.

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
    BiasActivationProblem,
    Operands,
    describe,
    make_options,
    result_dtype,
    result_shape,
)


class Scalars(NamedTuple):
    """The scalars of a call as the user gave them."""

    activation: Any
    gated: Any = False
    dropout_p: Any = 0.0
    backend: str | None = None


plans: dispatch.PlanCache[Plan] = dispatch.PlanCache()


def run(operands: Operands, scalars: Scalars, out: Tensor | None = None) -> Tensor:
    """y; written to `out`, or new if None."""
    if scalars.dropout_p:
        rng = philox.rng_of_call(operands.dropout_rng, scalars.dropout_p, operands.x, "x")
        operands = operands._replace(dropout_rng=rng)
    plan = plans.get(_make_plan, operands, scalars)
    if out is not None:
        _check_out(out, operands, plan)
    return profiling.call("bias_activation", plan.backend.NAME, _execute, plan, operands, out)


def _execute(plan: Plan, operands: Operands, out: Tensor | None) -> Tensor:
    """Any call that is checked and planned."""
    if plan.route is not FORMULA:
        y = fused.bias_activation(
            operands, plan.options, plan.backend.NAME, plan.needs_grad, plan.route, out
        )
    else:
        y = plan.backend.forward(operands, plan.options)
    return y if out is None or y is out else out.copy_(y)


def problem_of(operands: Operands, scalars: Scalars) -> BiasActivationProblem:
    """The checked description of a call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    options = make_options(
        activation=scalars.activation, gated=scalars.gated, dropout_p=scalars.dropout_p
    )
    return describe(operands, options)


def has_kernel(device: torch.device, dtype: torch.dtype, width: int, activation: str) -> bool:
    """True if another backend than the reference runs calls with x and bias like these."""
    options = make_options(activation=activation, gated=False, dropout_p=0.0)
    problem = BiasActivationProblem(
        device, dtype, (1, width), width, options, dtype, dtype, ("bias",), ("x", "bias")
    )
    return any(
        not dispatch.is_formula(backend)
        and dispatch.only_by_name(backend, problem, BACKENDS) is None
        and not dispatch.why_not(backend, problem)
        for backend in BACKENDS
    )


def smallest(device: torch.device, dtype: torch.dtype) -> BiasActivationProblem:
    """The problem of the smallest call."""
    x = torch.zeros(1, 1, dtype=dtype, device=device)
    return problem_of(Operands(x), Scalars("relu"))


def _make_plan(operands: Operands, scalars: Scalars) -> Plan:
    problem = problem_of(operands, scalars)
    backend = dispatch.select(BACKENDS, problem, scalars.backend)
    route = dispatch.route(operands, backend)
    return Plan(problem.options, backend, problem.requires_grad, route)


def _check_out(out: Tensor, operands: Operands, plan: Plan) -> None:
    checks.expect_shape("out", out, result_shape(operands, plan.options), "of the result")
    checks.expect_dtype("out", out, (result_dtype(operands),))
    checks.expect_device("out", out, operands.x.device)
    overlap.expect_writable("out", out)
    x, width = operands.x, out.shape[-1]
    if plan.options.gated and overlap.is_same(out, x.narrow(-1, 0, width)):  # over the gates
        operands = operands._replace(x=x.narrow(-1, width, width))
    overlap.expect_apart("out", out, operands, in_place=("x",))
    checks.expect_no_gradient("out", out, plan.needs_grad)
