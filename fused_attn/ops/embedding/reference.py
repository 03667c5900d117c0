"""The operation in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import philox
from .problem import NO_PADDING, EmbeddingProblem, Operands, Options, compute_dtype, result_dtype

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: EmbeddingProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in `result_dtype(operands)`, rounded once (Vaswani et al. 2017, sections 3.4 and 3.5).

    The casts come before the look-ups: their gradients then add up in the arithmetic's dtype.
    """
    tokens, weight, table, positions, rng = operands
    dtype = result_dtype(operands)
    compute = compute_dtype(dtype)
    padding_idx = None if options.padding_idx == NO_PADDING else options.padding_idx
    y = F.embedding(tokens, weight.to(compute), padding_idx) * options.scale
    if table is not None and positions is not None:
        y = y + F.embedding(positions, table.to(compute))
    elif table is not None:
        y = y + table[options.offset : options.offset + tokens.shape[-1]].to(compute)
    if rng is not None:
        y = _dropout(y, rng, options.dropout_p)
    return y.to(dtype).contiguous()


def _dropout(y: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """Y / (1 - p) where it is kept, else 0."""
    if dropout_p == 1.0:
        return torch.where(torch.zeros_like(y, dtype=torch.bool), y, 0.0)
    keep = philox.kept_in_rows(rng, dropout_p, math.prod(y.shape[:-1]), y.shape[-1])
    return torch.where(keep.reshape(y.shape), y / (1.0 - dropout_p), 0.0)
