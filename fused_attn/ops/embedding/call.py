"""The path of one call: check it, choose its backend, run it.

What must be checked, and who can run it, depends on shapes, dtypes and flags only. Both are worked
out once per signature and remembered, so that a repeated call costs one dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import philox, profiling, sequence
from .. import dispatch
from ..dispatch import FORMULA, Plan
from . import BACKENDS, fused
from .problem import EmbeddingProblem, Operands, check_weight, describe, make_options


class Scalars(NamedTuple):
    """The scalars of a call as the user gave them."""

    scale: Any = 1.0
    offset: Any = 0
    padding_idx: Any = None
    dropout_p: Any = 0.0
    backend: str | None = None


plans: dispatch.PlanCache[Plan] = dispatch.PlanCache()


def run(operands: Operands, scalars: Scalars) -> Tensor:
    """y, new."""
    if sequence.is_cut():
        operands, scalars = _of_part(operands, scalars)
    if scalars.dropout_p:
        rng = philox.rng_of_call(operands.dropout_rng, scalars.dropout_p, operands.weight, "weight")
        operands = operands._replace(dropout_rng=rng)
    plan = plans.get(_make_plan, operands, scalars)
    return profiling.call("embedding", plan.backend.NAME, _execute, plan, operands)


def _of_part(operands: Operands, scalars: Scalars) -> tuple[Operands, Scalars]:
    """Counted positions of one rank's part of a sequence, by their numbers."""
    tokens, _, table, positions, _ = operands
    if not isinstance(table, Tensor) or positions is not None or tokens.dim() == 0:
        return operands, scalars
    length = tokens.shape[-1]
    rows = sequence.rows_of(table.shape[0], length, scalars.offset, tokens.device)
    if rows is None:
        return operands, scalars
    expanded = rows.expand(tokens.shape).contiguous()
    return operands._replace(positions=expanded), scalars._replace(offset=0)


def _execute(plan: Plan, operands: Operands) -> Tensor:
    """Any call that is checked and planned."""
    if plan.route is not FORMULA:
        return fused.embedding(
            operands, plan.options, plan.backend.NAME, plan.needs_grad, plan.route
        )
    return plan.backend.forward(operands, plan.options)


def problem_of(operands: Operands, scalars: Scalars) -> EmbeddingProblem:
    """The checked description of a call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_weight(operands.weight)
    options = make_options(
        scale=scalars.scale,
        offset=scalars.offset,
        padding_idx=scalars.padding_idx,
        dropout_p=scalars.dropout_p,
        num_tokens=operands.weight.shape[0],
    )
    return describe(operands, options)


def smallest(device: torch.device, dtype: torch.dtype) -> EmbeddingProblem:
    """The problem of the smallest call."""
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    weight = torch.zeros(1, 1, dtype=dtype, device=device)
    return problem_of(Operands(tokens, weight), Scalars())


def _make_plan(operands: Operands, scalars: Scalars) -> Plan:
    problem = problem_of(operands, scalars)
    backend = dispatch.select(BACKENDS, problem, scalars.backend)
    route = dispatch.route(operands, backend)
    return Plan(problem.options, backend, problem.requires_grad, route)
