"""The public norm functions; `functional` hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime import checks, hints
from . import call
from .call import Scalars
from .problem import Operands


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """Layer normalisation (Ba, Kiros, Hinton 2016), as `torch.nn.functional.layer_norm`.

    In plain PyTorch, with statistics and arithmetic in float32 (float64 for float64)::

        centred = x - x.mean(dims, keepdim=True)    # dims: the last len(normalized_shape)
        y = centred * rsqrt((centred**2).mean(dims, keepdim=True) + eps) * w + bias
        # w = weight + weight_offset

    Args:
        x: (*, *normalized_shape), float32, float16, bfloat16 or float64; any strides.
        normalized_shape: sizes of the last dimensions of x; an integer stands for one of them.
        weight, bias: normalized_shape; x's dtype, or float32 with a 16-bit x.
        weight_offset: finite; added to the weight, which must be there then. 1 where a checkpoint
            holds what the weight differs from 1 by (Gemma).
        out: write y here instead of into a new tensor, x itself allowed; no gradient may be wanted.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        y, x's shape and dtype, new and contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    if unknown:
        hints.refuse_unknown("layer_norm", unknown, layer_norm.__annotations__)
    if weight_offset != 0.0:
        weight = _raised(weight, weight_offset, x)
    scalars = Scalars(_hashable(normalized_shape), eps, False, 0.0, backend)
    return call.run(Operands(x, None, weight, bias), scalars, out=out)[0]


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """Root mean square normalisation (Zhang, Sennrich 2019), as `torch.nn.functional.rms_norm`.

    In plain PyTorch, with statistics and arithmetic in float32 (float64 for float64)::

        y = x * rsqrt((x**2).mean(dims, keepdim=True) + eps) * (weight + weight_offset)

    Args:
        weight: normalized_shape, any floating dtype.
        eps: the machine epsilon of the arithmetic if None.
        x, normalized_shape, weight_offset, out, backend: as in `layer_norm`.

    Returns:
        y, x's shape and dtype, new and contiguous.

    Raises:
        TypeError, ValueError, UnsupportedError: as `layer_norm`.
    """
    if unknown:
        hints.refuse_unknown("rms_norm", unknown, rms_norm.__annotations__)
    if weight_offset != 0.0:
        weight = _raised(weight, weight_offset, x)
    scalars = Scalars(_hashable(normalized_shape), eps, True, 0.0, backend)
    return call.run(Operands(x, None, weight), scalars, out=out)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    return_sum: bool = False,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Any:
    """Dropout, residual connection and layer normalisation in one pass over memory.

    In plain PyTorch::

        h = dropout(x, dropout_p) + residual                  # rounded once
        y = layer_norm(h, normalized_shape, weight, bias, eps)

    Post-norm blocks (Vaswani et al. 2017, section 5.4) use y; pre-norm blocks use both.

    Args:
        residual: x's shape; where its dtype differs, y and h have the promoted one.
        dropout_p: probability in [0, 1] of dropping an element of x; the kept ones are divided by
            1 - dropout_p. Applied whenever it is not 0.
        dropout_rng: (2,) int64, seed and offset of the dropout. One pair gives the same mask on
            every backend. Drawn from torch's generator if None.
        return_sum: return h as well.
        out, sum_out: write y or h here instead of into new tensors; no gradient may be wanted.
            `sum_out=residual` updates the residual stream in place.
        x, normalized_shape, weight, bias, weight_offset, backend: as in `layer_norm`.

    Returns:
        y, or (y, h).

    Raises:
        TypeError, ValueError, UnsupportedError: as `layer_norm`.
    """
    if unknown:
        hints.refuse_unknown("add_layer_norm", unknown, add_layer_norm.__annotations__)
    if weight_offset != 0.0:
        weight = _raised(weight, weight_offset, x)
    scalars = Scalars(
        _hashable(normalized_shape),
        eps,
        False,
        dropout_p,
        backend,
        return_sum or sum_out is not None,
    )
    operands = Operands(x, residual, weight, bias, dropout_rng if dropout_p else None)
    y, h = call.run(operands, scalars, out, sum_out)
    return (y, h) if return_sum else y


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    return_sum: bool = False,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Any:
    """Dropout, residual connection and root mean square normalisation in one pass over memory.

    In plain PyTorch::

        h = dropout(x, dropout_p) + residual                  # rounded once
        y = rms_norm(h, normalized_shape, weight, eps)

    Args, returns and raises: as `add_layer_norm`; weight and eps as in `rms_norm`.
    """
    if unknown:
        hints.refuse_unknown("add_rms_norm", unknown, add_rms_norm.__annotations__)
    if weight_offset != 0.0:
        weight = _raised(weight, weight_offset, x)
    scalars = Scalars(
        _hashable(normalized_shape),
        eps,
        True,
        dropout_p,
        backend,
        return_sum or sum_out is not None,
    )
    operands = Operands(x, residual, weight, None, dropout_rng if dropout_p else None)
    y, h = call.run(operands, scalars, out, sum_out)
    return (y, h) if return_sum else y


def _raised(weight: Any, weight_offset: Any, x: Any) -> Any:
    """weight + weight_offset as the kernels compute: in float32 or, for float64, in float64."""
    offset = checks.expect_finite("weight_offset", weight_offset)
    if weight is None:
        raise ValueError(f"`weight_offset` must be 0 where `weight` is None, got {offset:g}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return weight  # for the checks to refuse
    wide = torch.float64 in (weight.dtype, getattr(x, "dtype", None))
    return weight.to(torch.float64 if wide else torch.float32) + offset


def _hashable(normalized_shape: Any) -> Any:
    return tuple(normalized_shape) if isinstance(normalized_shape, list) else normalized_shape
