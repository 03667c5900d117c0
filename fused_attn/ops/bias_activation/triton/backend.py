"""Triton kernels for GPUs (`kernels.py`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ....runtime import verified
from ....runtime.triton import device as triton_device
from ..problem import BiasActivationProblem, Operands, Options

NAME = "triton"
OPERANDS = frozenset(("bias", "dropout_rng"))
GRADIENTS = frozenset(("x", "bias"))

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(problem: BiasActivationProblem) -> list[str]:
    reasons = triton_device.why_not(problem.device)
    for dtype in dict.fromkeys((problem.dtype, problem.x_dtype, problem.bias_dtype)):
        if dtype is not None and dtype not in _DTYPES:
            reasons.append(f"has no kernels for {dtype}")
    return reasons


def only_by_name(problem: BiasActivationProblem) -> str | None:
    """What ran on no such GPU yet is nobody's default; stand-ins are for tests."""
    if triton_device.interpreted():
        return "Triton's interpreter is for tests"
    return verified.why_not("bias_activation", NAME, problem.device, problem.dtype)


def slower(problem: BiasActivationProblem) -> str | None:
    """Where torch's own functions were faster on this kind of GPU."""
    return verified.slower("bias_activation", NAME, problem.device, problem.dtype)


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    _launchers().forward(operands, options, y)


def backward(
    operands: Operands, options: Options, dy: Tensor, dx: Tensor | None, dbias: Tensor | None
) -> None:
    _launchers().backward(operands, options, dy, dx, dbias)


@functools.cache
def _launchers() -> Any:
    from . import launch  # imports Triton

    return launch
