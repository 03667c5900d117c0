"""Liger-Kernel's Triton kernels: norms and SwiGLU, GELU."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from ..operations.bias_activation import BiasActivation
from ..operations.layer_norm import EPS, AddNorm
from ..problem import Prepared, leaves
from .peer import Peer, import_error, needs_gpu


def _functions() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def _add_norm(problem: AddNorm, tensors: dict[str, Tensor]) -> Prepared:
    """Its fused add + RMSNorm; for LayerNorm, which it has without the residual, torch adds."""
    functions = _functions()
    x, residual, *parameters = tensors.values()

    def forward() -> tuple[Tensor, Tensor]:
        if problem.rms:
            return functions.liger_fused_add_rms_norm(
                x, residual, *parameters, EPS, 0.0, "llama", False
            )
        h = x + residual
        return functions.liger_layer_norm(h, *parameters, EPS), h

    return Prepared(forward, leaves(problem, tensors))


def _bias_activation(problem: BiasActivation, tensors: dict[str, Tensor]) -> Prepared:
    """Its SwiGLU takes two tensors; torch adds the bias."""
    functions = _functions()
    x, bias = tensors.values()

    def forward() -> Tensor:
        gate, up = (x + bias).chunk(2, dim=-1)
        return functions.liger_swiglu(gate, up)

    return Prepared(forward, leaves(problem, tensors))


def _limits(problem: AddNorm | BiasActivation) -> list[str]:
    reasons = needs_gpu(problem)
    if problem.operation == "bias_activation" and problem.variant != "swiglu":
        reasons.append("has no GELU without a gate")
    if isinstance(problem, BiasActivation) and problem.dropout:
        reasons.append("is asked without dropout")
    return reasons


PEERS = (
    Peer(
        "liger",
        {"add_norm": _add_norm, "bias_activation": _bias_activation},
        missing=functools.partial(
            import_error, "liger_kernel.transformers.functional", "liger-kernel"
        ),
        limits=_limits,
        package="liger_kernel.transformers.functional",
    ),
)
