"""The path of one attention call: check it, choose its backend, run it.

What must be checked, and who can run it, depends on shapes, dtypes and flags only. Both are worked
out once per signature and remembered, so that a repeated call costs one dictionary look-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import autocast, checks, debug, higher_order, hints, philox, sequence
from ...runtime.profiling import profiler, recorded
from .. import dispatch
from ..dispatch import FORMULA, KERNEL
from . import BACKENDS, fast_path, fused, reference, sinks, values
from .problem import BHLD, WEIGHTS, AttentionProblem, Operands, describe, make_options


class Scalars(NamedTuple):
    """The scalars of a call as the user gave them."""

    causal: Any = False
    window: Any = None
    softcap: Any = None
    scale: Any = None
    dropout_p: Any = 0.0
    return_weights: Any = None
    backend: str | None = None
    max_seqlen_q: int | None = None  # packed problems only
    max_seqlen_k: int | None = None
    return_lse: bool = False
    layout: str = BHLD  # of out in memory; its shape is (B, H, Lq, Dv) here, as that of all others
    chunk: Any = None


plans: dispatch.PlanCache[fused.Plan] = dispatch.PlanCache()
# Of calls as they are asked for, before what no kernel knows is taken out of them.
problems: dispatch.PlanCache[AttentionProblem] = dispatch.PlanCache()
_autocast_enabled = torch._C._is_any_autocast_enabled


def run(operands: Operands, scalars: Scalars, out: Tensor | None = None) -> fused.Result:
    """out, lse and weights of a call; the last two None unless they are asked for.

    Args:
        out: the tensor to write the output to; a new one if None.
    """
    if sequence.is_cut() and (parts := sequence.current()) is not None:
        return _over_all_ranks(parts, operands, scalars, out)
    if _autocast_enabled():
        operands = _autocast(operands)
    if operands.sinks is not None and scalars.backend != reference.NAME:
        return _with_sinks(operands, scalars, out)
    if debug.enabled:
        debug.look_at_call(operands, scalars.layout)
    if operands.alibi_slopes is not None:
        operands = _differentiable_alibi(operands, scalars)
    if scalars.dropout_p:
        rng = philox.rng_of_call(operands.dropout_rng, scalars.dropout_p, operands.q, "q")
        operands = operands._replace(dropout_rng=rng)
    plan = plans.get(_make_plan, operands, scalars)
    if plan.broadcasts:
        operands = broadcast(operands)
    if plan.has_lengths:
        values.check(operands, plan.options)
    if profiler._is_profiler_enabled:
        with recorded("attention", plan.settings.backend):
            return _execute(plan, operands, scalars, out)
    if plan.fast and out is None:
        if not plan.needs_grad:
            return fast_path.run(operands, plan), None, None
        # By number: unpacking or names would take longer.
        return fast_path.apply(operands[0], operands[1], operands[2], operands, plan), None, None
    return _execute(plan, operands, scalars, out)


def _execute(
    plan: fused.Plan, operands: Operands, scalars: Scalars, out: Tensor | None
) -> fused.Result:
    """Any call that is checked and planned."""
    if plan.route is not FORMULA:
        result, lse, weights = fused.attention(operands, plan, out)
    else:
        wanted = plan.settings.return_weights
        result, lse, weights = plan.backend.forward(operands, plan.options, wanted)
    if out is not None and result is not out:
        result = out.copy_(result)
    return result, lse if scalars.return_lse else None, weights


def _over_all_ranks(
    parts: sequence.Shards, operands: Operands, scalars: Scalars, out: Tensor | None
) -> fused.Result:
    """Inside a context in which the sequence is spread: over the keys of all ranks."""
    if out is not None:
        raise dispatch.UnsupportedError("`out` must be None inside `context_parallel`")
    return parts.attend(operands, scalars)


def _with_sinks(operands: Operands, scalars: Scalars, out: Tensor | None) -> fused.Result:
    """A call whose sinks are worked in afterwards: any backend can run the rest."""
    problem = problems.get(problem_of, operands, scalars)
    every_head = scalars.return_weights is None or scalars.return_weights == "per_head"
    if not every_head:  # an average over heads cannot be taken apart again
        scalars = scalars._replace(return_weights="per_head")
    plain = operands._replace(sinks=None)
    result, lse, weights = run(plain, scalars._replace(return_lse=True), out)
    assert lse is not None
    assert operands.sinks is not None
    result, lse, weights = sinks.join(
        result, lse, weights, operands.sinks, in_place=not problem.requires_grad
    )
    if operands.cu_seqlens_q is not None:  # rows past the last sequence see no sink either
        row = torch.arange(lse.shape[-1], device=lse.device)
        lse = lse.masked_fill(row >= operands.cu_seqlens_q[-1], -torch.inf)
    if weights is not None and not every_head:
        weights = weights.mean(dim=1, keepdim=True)
    return result, lse, weights


def _differentiable_alibi(operands: Operands, scalars: Scalars) -> Operands:
    """ALiBi as a bias where its slopes want a gradient, which no kernel computes.

    It takes memory for (H, Lq, Lk). In packed batches, whose sequences differ in distance, the
    reference runs.
    """
    slopes, bias = operands.alibi_slopes, operands.bias
    if operands.cu_seqlens_q is not None or "alibi_slopes" not in higher_order.wanted_of(operands):
        return operands
    problems.get(problem_of, operands, scalars)  # for its checks
    assert slopes is not None
    shift = operands.k.shape[2] - operands.q.shape[2]
    term = -slopes[:, None, None] * reference.alibi_distance(operands, shift)
    return operands._replace(alibi_slopes=None, bias=term[None] if bias is None else bias + term)


def problem_of(operands: Operands, scalars: Scalars) -> AttentionProblem:
    """The checked description of a call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, operand in zip(("q", "k", "v"), operands[:3], strict=True):
        checks.expect_rank(name, operand, 4, "(B, heads, L, head size)")
    operands = broadcast(operands)
    q, k = operands.q, operands.k
    if not (scalars.return_weights is None or isinstance(scalars.return_weights, str)) or (
        scalars.return_weights not in WEIGHTS
    ):
        raise ValueError(
            "`return_weights` must be None, 'average' or 'per_head', "
            f"got {checks.type_name(scalars.return_weights)}"
        )
    packed = operands.cu_seqlens_q is not None
    options = make_options(
        max_seqlen_q=_max_seqlen("max_seqlen_q", scalars.max_seqlen_q) if packed else q.shape[2],
        max_seqlen_k=_max_seqlen("max_seqlen_k", scalars.max_seqlen_k) if packed else k.shape[2],
        head_dim=q.shape[3],
        causal=scalars.causal,
        window=scalars.window,
        scale=scalars.scale,
        softcap=scalars.softcap,
        dropout_p=scalars.dropout_p,
        chunk=scalars.chunk,
    )
    return describe(operands, options, WEIGHTS[scalars.return_weights], scalars.return_lse)


def broadcast(operands: Operands) -> Operands:
    """Views in which one batch element of q, or of k and v, stands for all of the others'.

    Sizes that do not fit stay for the checks to refuse.
    """
    if not _broadcasts(operands):
        return operands
    batch = next(x.shape[0] for x in operands[:3] if x.shape[0] != 1)
    q, k, v = (x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x for x in operands[:3])
    return operands._replace(q=q, k=k, v=v)


def _broadcasts(operands: Operands) -> bool:
    """Whether some of q, k and v have one batch element and some another number."""
    q, k, v = operands[:3]
    return not q.shape[0] == k.shape[0] == v.shape[0]


def asked_of_backends(operands: Operands, scalars: Scalars) -> AttentionProblem:
    """The problem as the backends see it, who know nothing of what is worked in afterwards."""
    if operands.alibi_slopes is not None:
        operands = _differentiable_alibi(operands, scalars)
    problem = problem_of(operands, scalars)
    return problem if scalars.backend == reference.NAME else problem.without("sinks")


def _max_seqlen(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
        message = f"`{name}` must be an integer >= 0, got {checks.type_name(value)}"
        hint = f"`int({name})`, or any bound that is known without a look at the device"
        raise ValueError(hints.with_hint(message, hint if isinstance(value, Tensor) else None))
    return value


def smallest(device: torch.device, dtype: torch.dtype) -> AttentionProblem:
    """The problem of the smallest call."""
    x = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
    return problem_of(Operands(x, x, x), Scalars())


def _make_plan(operands: Operands, scalars: Scalars) -> fused.Plan:
    problem = problem_of(operands, scalars)
    broadcasts = _broadcasts(operands)
    operands = broadcast(operands)
    needs_grad = problem.requires_grad
    backend = dispatch.select(BACKENDS, problem, scalars.backend)
    settings = fused.Settings(problem.weights, scalars.return_lse, scalars.layout, backend.NAME)
    route = dispatch.route(operands, backend)
    is_fast = route is KERNEL and fast_path.can_run(operands, settings, needs_grad)
    keeps = is_fast and needs_grad and not fast_path.computes_again(backend, problem)
    lse_like = fast_path.lse_like(operands.q) if keeps else None
    lengths = (operands.key_lengths, operands.cu_seqlens_q, operands.prefix_lengths)
    return fused.Plan(
        problem.options,
        settings,
        backend,
        needs_grad,
        route,
        is_fast,
        lse_like,
        has_lengths=any(x is not None for x in lengths),
        broadcasts=broadcasts,
    )


def _autocast(operands: Operands) -> Operands:
    """q, k and v in the autocast dtype, as torch does for its own attention."""
    dtype = autocast.dtype_for(operands.q)
    if dtype is None:
        return operands
    bias = operands.bias
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    return operands._replace(
        q=operands.q.to(dtype), k=operands.k.to(dtype), v=operands.v.to(dtype), bias=bias
    )
