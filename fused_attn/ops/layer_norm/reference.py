"""The norms in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...runtime import philox
from .problem import LayerNormProblem, Operands, Options, compute_dtype, sum_dtype

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: LayerNormProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Y = norm(h) * weight + bias, and h = dropout(x) + residual, both in `sum_dtype(operands)`.

    h is rounded to that dtype before it is normalised, so y is the same whether h is asked for or
    not, and the same as that of a separate add and norm. Ba, Kiros, Hinton 2016, equation 4;
    Zhang, Sennrich 2019, equation 4.
    """
    h = add(operands, options)
    return normalize(h, operands.weight, operands.bias, options).contiguous(), h.contiguous()


def add(operands: Operands, options: Options) -> Tensor:
    """H = dropout(x) + residual, rounded once."""
    x, residual = operands.x, operands.residual
    if residual is None and operands.dropout_rng is None:
        return x
    dtype = sum_dtype(operands)
    h = x.to(compute_dtype(dtype))
    if operands.dropout_rng is not None:
        h = dropout(h, operands.dropout_rng, options)
    if residual is not None:
        h = h + residual.to(h.dtype)
    return h.to(dtype)


def normalize(h: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """The norm itself; statistics and arithmetic in float32 (float64 for float64)."""
    dims = tuple(range(-options.dims, 0))
    z = h.to(compute_dtype(h.dtype))
    if not options.rms and 0 not in z.shape:
        z = z - _equal_numbers(z, dims)
    factor = _power_of_two(z, dims, options.eps)
    z = z * factor
    if not options.rms:
        z = z - z.mean(dims, keepdim=True)
    y = z * torch.rsqrt((z * z).mean(dims, keepdim=True) + options.eps * factor * factor)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(h.dtype)


def _equal_numbers(z: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What all numbers of a row are, if they are one, else 0.

    A norm does not see what is added to a whole row. Without it equal numbers are exactly 0, and
    their mean cannot overflow.
    """
    largest = z.detach().amax(dims, keepdim=True)
    return torch.where(largest == z.detach().amin(dims, keepdim=True), largest, 0.0)


def _power_of_two(z: Tensor, dims: tuple[int, ...], eps: float) -> Tensor | float:
    """What keeps the squares of each row in range, eps included: nearly always 1."""
    if 0 in z.shape[-len(dims) :]:
        return 1.0
    reach = 40 if z.dtype == torch.float32 else 400
    size = z.detach().abs().amax(dims, keepdim=True).clamp(min=math.sqrt(eps))
    exponent = -torch.log2(size).floor().clamp(-2.5 * reach, 2.5 * reach)
    moderate = (exponent.abs() <= reach) | (size == 0.0)
    return torch.where(moderate, 1.0, torch.exp2(exponent))


def dropout(x: Tensor, rng: Tensor, options: Options) -> Tensor:
    """X / (1 - p) where it is kept, else 0."""
    if options.dropout_p == 1.0:
        return torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0)
    keep = keep_mask(rng, options, x.shape)
    return torch.where(keep, x / (1.0 - options.dropout_p), 0.0)


def keep_mask(rng: Tensor, options: Options, shape: torch.Size) -> Tensor:
    """Which elements of x survive the dropout: bool of `shape`."""
    rows = math.prod(shape[: len(shape) - options.dims])
    width = math.prod(shape[len(shape) - options.dims :])
    return philox.kept_in_rows(rng, options.dropout_p, rows, width).reshape(shape)
