"""C++ kernels for the CPU (`csrc/layer_norm/cpu`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import native
from .problem import LayerNormProblem, Operands, Options

NAME = "cpu"
OPERANDS = frozenset(("residual", "weight", "bias", "dropout_rng"))
GRADIENTS = frozenset(("x", "residual", "weight", "bias"))


def why_not(problem: LayerNormProblem) -> list[str]:
    return native.why_not_on(problem.device)


def detail() -> str:
    """Which kernels they are."""
    return native.level()


def forward(
    operands: Operands,
    options: Options,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    native.module().layer_norm_forward(
        *operands, y, h, mean, rstd, *options, torch.get_num_threads()
    )


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
    native.module().layer_norm_backward(
        *operands,
        *(summed, mean, rstd, dy, dh),
        *(dx, dresidual, dweight, dbias),
        *options,
        torch.get_num_threads(),
    )
