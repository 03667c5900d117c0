"""Triton kernels for GPUs (`forward.py`, `backward.py`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ....runtime import verified
from ....runtime.triton import device as triton_device
from ..problem import LayerNormProblem, Operands, Options

NAME = "triton"
OPERANDS = frozenset(("residual", "weight", "bias", "dropout_rng"))
GRADIENTS = frozenset(("x", "residual", "weight", "bias"))

MAX_WIDTH = 65536
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(problem: LayerNormProblem) -> list[str]:
    reasons = triton_device.why_not(problem.device)
    if problem.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {problem.dtype}")
    if problem.width > MAX_WIDTH:
        reasons.append(f"serves rows of up to {MAX_WIDTH} elements, got width={problem.width}")
    return reasons


def only_by_name(problem: LayerNormProblem) -> str | None:
    """What ran on no such GPU yet is nobody's default; stand-ins are for tests."""
    if triton_device.interpreted():
        return "Triton's interpreter is for tests"
    return verified.why_not("layer_norm", NAME, problem.device, problem.dtype)


def slower(problem: LayerNormProblem) -> str | None:
    """Where torch's own functions were faster on this kind of GPU."""
    return verified.slower("layer_norm", NAME, problem.device, problem.dtype)


def forward(
    operands: Operands,
    options: Options,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    _launchers().forward(operands, options, y, h, mean, rstd)


def backward(
    operands: Operands,
    options: Options,
    summed: bool,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    grads = (dx, dresidual, dweight, dbias)
    _launchers().backward(operands, options, summed, mean, rstd, dy, dh, grads)


@functools.cache
def _launchers() -> Any:
    from . import launch  # imports Triton

    return launch
