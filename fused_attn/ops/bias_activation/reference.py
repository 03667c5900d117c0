"""The operation in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import philox
from .problem import BiasActivationProblem, Operands, Options, compute_dtype, result_dtype

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: BiasActivationProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in `result_dtype(operands)`, rounded once.

    GELU: Hendrycks, Gimpel 2016, exact and with their tanh; SiLU: Elfwing, Uchibe, Doya 2017; the
    gated forms (GLU variants): Shazeer 2020, equation 5.
    """
    x, bias, rng = operands
    dtype = result_dtype(operands)
    h = x.to(compute_dtype(dtype))
    if bias is not None:
        h = h + bias.to(h.dtype)
    if options.gated:
        gate, up = h.chunk(2, dim=-1)
        y = activate(gate, options.activation) * up
    else:
        y = activate(h, options.activation)
    if rng is not None:
        y = dropout(y, rng, options.dropout_p)
    return y.to(dtype).contiguous()


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation called `activation` of x."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def dropout(y: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """Y / (1 - p) where it is kept, else 0."""
    if dropout_p == 1.0:
        return torch.where(torch.zeros_like(y, dtype=torch.bool), y, 0.0)
    keep = philox.kept_in_rows(rng, dropout_p, math.prod(y.shape[:-1]), y.shape[-1])
    return torch.where(keep.reshape(y.shape), y / (1.0 - dropout_p), 0.0)
