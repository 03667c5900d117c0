"""The operators and the autograd rule of bias + activation, shared by all fused backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import operators
from . import reference
from .problem import Operands, Options, result_dtype, result_shape


def _empty_result(operands: Operands, options: Options) -> Tensor:
    shape = result_shape(operands, options)
    return torch.empty(shape, dtype=result_dtype(operands), device=operands.x.device)


bias_activation = operators.recomputing(
    "bias_activation",
    __package__,
    Operands,
    Options,
    ("x", "bias"),
    _empty_result,
    reference.forward,
)
