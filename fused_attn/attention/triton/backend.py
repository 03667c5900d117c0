"""Triton kernels for GPUs (`forward.py`, `backward.py`, ...)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import triton_runtime
from ..problem import AttentionProblem, Operands, Options
from . import config

NAME = "triton"

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(problem: AttentionProblem) -> list[str]:
    reasons = triton_runtime.why_not(problem.device)
    if problem.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {problem.dtype}")
    if problem.dtype == torch.bfloat16 and triton_runtime.interpreted():
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem, name)
        if size > MAX_HEAD_DIM:
            reasons.append(f"serves head sizes up to {MAX_HEAD_DIM}, got {name}={size}")
    if not reasons:
        reasons += config.why_not(_kind(problem))
        if _takes_bias_gradient(problem) and triton_runtime.version() < (3, 6):
            reasons.append("Triton 3.5 fails to compile the gradient of a bias, 3.6 does not")
    return reasons


def _takes_bias_gradient(problem: AttentionProblem) -> bool:
    return problem.bias_shape is not None and problem.requires_grad


def _kind(problem: AttentionProblem) -> config.Kind:
    return config.Kind(
        max(problem.head_dim, problem.head_dim_v),
        problem.dtype.itemsize,
        triton_runtime.arch(problem.device),
        0,
        triton_runtime.shared_memory(problem.device),
    )


def only_by_name() -> bool:
    """The interpreter is for tests: it is orders of magnitude slower than plain PyTorch."""
    return triton_runtime.interpreted()


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    _launchers().forward(operands, options, out, lse)


def weights(
    operands: Operands, options: Options, lse: Tensor, weights: Tensor, average: bool
) -> None:
    _launchers().weights(operands, options, lse, weights, average)


def backward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    _launchers().backward(operands, options, out, lse, dout, dlse, dweights, (dq, dk, dv, dbias))


def _launchers() -> Any:
    from . import launch  # imports Triton

    return launch
