"""QuACK's RMSNorm with residual, and its LayerNorm forward."""

from __future__ import annotations

import functools
import importlib

from torch import Tensor

from ..operations.layer_norm import EPS, AddNorm
from ..problem import Prepared, leaves
from .peer import Peer, import_error, needs_gpu


def _add_norm(problem: AddNorm, tensors: dict[str, Tensor]) -> Prepared:
    x, residual, weight, *bias = tensors.values()
    if problem.rms:
        rmsnorm = importlib.import_module("quack").rmsnorm
        run = functools.partial(rmsnorm, x, weight, residual=residual, eps=EPS, prenorm=True)
        return Prepared(run, leaves(problem, tensors))
    layernorm = importlib.import_module("quack.rmsnorm").layernorm_fwd
    weight, bias = weight.float(), [b.float() for b in bias]  # it takes no other dtype

    def forward() -> tuple[Tensor, Tensor]:
        h = x + residual
        return layernorm(h, weight, *bias, EPS), h

    return Prepared(forward)


def _limits(problem: AddNorm) -> list[str]:
    reasons = needs_gpu(problem)
    if not problem.rms and problem.wants_gradient:
        reasons.append("its LayerNorm is not differentiable")
    return reasons


PEERS = (
    Peer(
        "quack",
        {"add_norm": _add_norm},
        missing=functools.partial(import_error, "quack", "quack-kernels"),
        limits=_limits,
        package="quack",
    ),
)
