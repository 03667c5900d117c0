"""The operation in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.activations import activate, dropout
from .problem import LinearProblem, Operands, Options

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: LinearProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in x's dtype; sums in float32 (float64 for float64), rounded once."""
    x, weight, bias, residual, _ = operands
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        y = y + bias.to(dtype)
    y = after_product(y, operands, options)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype).contiguous()


def after_product(h: Tensor, operands: Operands, options: Options) -> Tensor:
    """What activation, gate and dropout make of a product with its bias."""
    if options.gated:
        gate, up = h.chunk(2, dim=-1)
        h = activate(gate, options.activation) * up
    elif options.activation:
        h = activate(h, options.activation)
    rng = operands.dropout_rng
    return h if rng is None else dropout(h, rng, options.dropout_p)
