"""The operation in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import LinearProblem, Operands, Options

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: LinearProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in x's dtype; sums in float32 (float64 for float64), rounded once."""
    x, weight, bias = operands
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).contiguous()
