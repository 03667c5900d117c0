"""C++ kernels for the CPU (`csrc/bias_activation/`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import native
from .problem import BiasActivationProblem, Operands, Options

NAME = "cpu"


def why_not(problem: BiasActivationProblem) -> list[str]:
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"needs tensors on the CPU, these are on {problem.device}")
    missing = native.why_not()
    if missing is not None:
        reasons.append(missing)
    return reasons


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    native.module().bias_activation_forward(*operands, y, *options, torch.get_num_threads())


def backward(
    operands: Operands, options: Options, dy: Tensor, dx: Tensor | None, dbias: Tensor | None
) -> None:
    native.module().bias_activation_backward(
        *operands, dy, dx, dbias, *options, torch.get_num_threads()
    )
