"""Calls that want `out` alone, of which no step can be spared.

Most calls are of this kind. Every argument, result, saved tensor and Python call costs tenths of a
microsecond, and a tiny call takes four in all, thirty with its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, empty_like

from ...runtime import higher_order
from ...runtime.profiling import profiler
from .. import dispatch
from .fused import Plan, Settings, dense_like, gradients, statistics_dtype
from .problem import BHLD, NO_WEIGHTS, AttentionProblem, Operands


def can_run(operands: Operands, settings: Settings, needs_grad: bool) -> bool:
    """True if a call that the kernel runs wants `out` alone, with gradients of q, k, v at most."""
    usual = settings[:3] == (NO_WEIGHTS, False, BHLD)
    if not usual or operands.q.shape[3] != operands.v.shape[3]:
        return False
    if needs_grad and (not is_tested or any(operand is not None for operand in operands[3:])):
        return False
    return not higher_order.forward_mode() and all(map(higher_order.is_alive, operands[:3]))


def run(operands: Operands, plan: Plan) -> Tensor:
    """A call without gradients, with nothing to spare."""
    out = dense_like(operands[0])
    plan.backend.forward(operands, plan.options, out, None)
    return out


def computes_again(backend: Any, problem: AttentionProblem) -> bool:
    """True if the backend's `backward` is to be given neither out nor lse, as it says itself."""
    return getattr(backend, "computes_again", lambda problem: False)(problem)


def lse_like(q: Tensor) -> Tensor:
    """Something of lse's shape and dtype: `empty_like` is faster than `empty`.

    It is one number, repeated, and costs no memory.
    """
    return torch.empty((), dtype=statistics_dtype(q), device=q.device).expand(q.shape[:3])


class _FastAttention(torch.autograd.Function):
    """`fused._Attention` of q, k and v and nothing else, eagerly: the same."""

    # torch asks for it by a name that it makes each time, which no cache knows.
    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, operands: Operands, plan: Plan
    ) -> Tensor:
        out = dense_like(q)
        ctx.plan = plan
        if plan.lse_like is None:
            plan.backend.forward(operands, plan.options, out, None)
            ctx.save_for_backward(q, k, v)
            return out
        lse = empty_like(plan.lse_like, memory_format=torch.contiguous_format)
        plan.backend.forward(operands, plan.options, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        out, lse = kept or (None, None)
        operands, plan, needs = Operands(q, k, v), ctx.plan, ctx.needs_input_grad
        if profiler._is_profiler_enabled or not dispatch.backward_is_plain(dout):
            wanted = (*needs[:3], False)
            options, settings = plan.options, plan.settings
            given = (dout, None, None)
            grads = gradients(operands, options, settings, out, lse, given, wanted)
            return (*grads[:3], None, None)
        need_q, need_k, need_v, _, _ = needs
        dq = empty_like(q) if need_q else None
        dk = empty_like(k) if need_k else None
        dv = empty_like(v) if need_v else None
        plan.backend.backward(operands, plan.options, out, lse, dout, None, None, dq, dk, dv, None)
        return dq, dk, dv, None, None


# The versions of torch that this way around its Python has been tested with. With any other one, or
# where a piece of it is missing, calls with gradients take the plain way: `fused._Attention`.
_TESTED = ((2, 9), (2, 13))


def _is_tested() -> bool:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    known = hasattr(_FastAttention, "_backward_cls") and hasattr(torch._C, "_FunctionBase")
    return _TESTED[0] <= version <= _TESTED[1] and known


# `_FastAttention.apply` without what torch does in Python first (1.5 us): it asks for transforms
# of torch.func, under which no kernel runs, and unwraps tensors that those left behind, which do
# not come here (`can_run`). Likewise its way to `backward` (0.4 us), which asks whether a subclass
# calls it `vjp`.
is_tested = _is_tested()
apply = _FastAttention.apply
if is_tested:
    apply = super(torch.autograd.Function, _FastAttention).apply
    _FastAttention._backward_cls.apply = _FastAttention.backward  # type: ignore[attr-defined]
