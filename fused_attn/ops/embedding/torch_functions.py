"""torch's own embedding, wherever it can express the call.

It serves calls on GPUs, where we have no kernels, and gathers rows before it computes: the formula
converts the whole weight first, so that gradients add up in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import higher_order
from .problem import NO_PADDING, EmbeddingProblem, Operands, Options

NAME = "torch"
IS_FORMULA = IS_TORCH = True  # ordinary torch code: whoever traces sees torch's operators
OPERANDS = frozenset(("table", "positions"))
GRADIENTS = frozenset(("weight", "table"))


def why_not(problem: EmbeddingProblem) -> list[str]:
    if higher_order.needs_formula() or higher_order.forward_mode():
        return ["leaves transforms and forward-mode derivatives to the formula"]
    return []


def only_by_name(problem: EmbeddingProblem) -> str | None:
    return None if problem.device.type == "cuda" else "our own kernels are faster here"


def forward(operands: Operands, options: Options) -> Tensor:
    """y, rounded once; autograd differentiates torch's functions to any order."""
    tokens, weight, table, positions, _ = operands
    padding_idx = None if options.padding_idx == NO_PADDING else options.padding_idx
    y = F.embedding(tokens, weight, padding_idx)
    if table is None:
        return y if options.scale == 1.0 else y * options.scale
    if positions is None:
        rows = table[options.offset : options.offset + tokens.shape[-1]]
    else:
        rows = F.embedding(positions, table)
    return torch.add(rows, y, alpha=options.scale).contiguous()
