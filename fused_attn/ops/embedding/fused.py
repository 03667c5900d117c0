"""The operators and the autograd rule of embedding, shared by all fused backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import operators
from . import reference
from .problem import Operands, Options, result_dtype, result_shape


def _empty_result(operands: Operands, options: Options) -> Tensor:
    shape, dtype = result_shape(operands), result_dtype(operands)
    return torch.empty(shape, dtype=dtype, device=operands.weight.device)


embedding = operators.recomputing(
    "embedding",
    __package__,
    Operands,
    Options,
    ("weight", "table"),
    _empty_result,
    reference.forward,
)
