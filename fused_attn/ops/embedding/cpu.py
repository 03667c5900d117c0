"""C++ kernels for the CPU (`csrc/embedding/`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import native
from .problem import EmbeddingProblem, Operands, Options

NAME = "cpu"
OPERANDS = frozenset(("table", "positions", "dropout_rng"))
GRADIENTS = frozenset(("weight", "table"))


def why_not(problem: EmbeddingProblem) -> list[str]:
    return native.why_not_on(problem.device)


def detail() -> str:
    """Which kernels they are."""
    return native.level()


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    native.module().embedding_forward(*_dense(operands), y, *options, torch.get_num_threads())


def backward(
    operands: Operands, options: Options, dy: Tensor, dweight: Tensor | None, dtable: Tensor | None
) -> None:
    native.module().embedding_backward(
        *_dense(operands), dy, dweight, dtable, *options, torch.get_num_threads()
    )


def _dense(operands: Operands) -> Operands:
    """With contiguous indices: they are few next to the rows that they name."""
    positions = operands.positions
    return operands._replace(
        tokens=operands.tokens.contiguous(),
        positions=None if positions is None else positions.contiguous(),
    )
