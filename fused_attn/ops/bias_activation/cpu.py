"""C++ kernels for the CPU (`csrc/bias_activation/`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import native
from .problem import BiasActivationProblem, Operands, Options

NAME = "cpu"
OPERANDS = frozenset(("bias", "dropout_rng"))
GRADIENTS = frozenset(("x", "bias"))


def why_not(problem: BiasActivationProblem) -> list[str]:
    return native.why_not_on(problem.device)


def detail() -> str:
    """Which kernels they are."""
    return native.level()


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    native.module().bias_activation_forward(*operands, y, *options, torch.get_num_threads())


def backward(
    operands: Operands, options: Options, dy: Tensor, dx: Tensor | None, dbias: Tensor | None
) -> None:
    native.module().bias_activation_backward(
        *operands, dy, dx, dbias, *options, torch.get_num_threads()
    )
