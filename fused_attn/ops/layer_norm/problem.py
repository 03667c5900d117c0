"""What one norm call is: its tensors, its scalars, and a description that holds no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, higher_order
from .. import dispatch


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operator schema and of `_C`.

    A row is what one pair of statistics covers: the last `Options.dims` dimensions of x.
    """

    x: Tensor
    residual: Tensor | None = None  # shape of x
    weight: Tensor | None = None  # shape of a row
    bias: Tensor | None = None  # shape of a row; LayerNorm only
    dropout_rng: Tensor | None = None  # (2,) int64: seed and offset of the dropout


class Options(NamedTuple):
    """The scalars of a call, in the order of the operator schema and of `_C`."""

    dims: int  # number of normalised dimensions
    eps: float
    rms: bool  # RMSNorm: no mean is taken off
    dropout_p: float  # of x, before the residual is added


@dataclass(frozen=True)
class LayerNormProblem(dispatch.Described):
    """Everything that decides whether and where a call can run; no tensor, no data.

    Attributes:
        shape, dtype: of y and of the sum.
        width: elements of a row.
        x_dtype, residual_dtype, weight_dtype, bias_dtype: of the operands; None for an absent one.
        operands: names of the optional tensors that the call brings.
        gradients: names of the operands of which a derivative is wanted.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    width: int
    options: Options
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    operands: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    def __str__(self) -> str:
        o = self.options
        parts = [
            f"{'rms_norm' if o.rms else 'layer_norm'} on {self.device}, {self.dtype}: "
            f"shape={self.shape}",
            f"width={self.width}",
        ]
        for name in ("residual", "weight", "bias"):
            dtype = getattr(self, f"{name}_dtype")
            if dtype is not None:
                parts.append(f"{name} {dtype}")
        if o.dropout_p:
            parts.append(f"dropout_p={o.dropout_p}")
        if self.requires_grad:
            parts.append("with gradient")
        return ", ".join(parts)


def sum_dtype(operands: Operands) -> torch.dtype:
    """Of y and of the sum: that of x, promoted with the residual's as `x + residual` does."""
    x, residual = operands.x, operands.residual
    if residual is None or residual.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, residual.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and of all arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(operands: Operands, options: Options, row: tuple[int, ...]) -> LayerNormProblem:
    """Check `operands` against each other and `row`, the normalised shape; describe the call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    x, residual, weight, bias, rng = operands
    checks.expect_tensor("x", x)
    checks.expect_dtype("x", x, checks.FLOAT_DTYPES)
    if x.dim() < len(row) or tuple(x.shape[x.dim() - len(row) :]) != row:
        raise ValueError(f"`x` must end in `normalized_shape` {row}, got shape {tuple(x.shape)}")
    if residual is not None:
        checks.expect_shape("residual", residual, tuple(x.shape), "of `x`")
        checks.expect_dtype("residual", residual, checks.FLOAT_DTYPES)
    dtype = sum_dtype(operands)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        checks.expect_shape(name, parameter, row, "normalized_shape")
        checks.expect_dtype(name, parameter, _parameter_dtypes(dtype, options.rms))
    if rng is not None:
        checks.expect_shape("dropout_rng", rng, (2,), "(2,)")
        checks.expect_dtype("dropout_rng", rng, (torch.int64,))
    for name, operand in zip(Operands._fields, operands, strict=True):
        if operand is not None:
            checks.expect_device(name, operand, x.device)
    width = 1
    for size in row:
        width *= size
    return LayerNormProblem(
        device=x.device,
        dtype=dtype,
        shape=tuple(x.shape),
        width=width,
        options=options,
        x_dtype=x.dtype,
        residual_dtype=None if residual is None else residual.dtype,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        operands=checks.present(operands),
        gradients=higher_order.wanted_of(operands),
    )


def _parameter_dtypes(dtype: torch.dtype, rms: bool) -> tuple[torch.dtype, ...]:
    """What torch allows: LayerNorm's parameters may be wider than 16 bits, RMSNorm's anything."""
    if rms:
        return checks.FLOAT_DTYPES
    if dtype in (torch.float16, torch.bfloat16):
        return dtype, torch.float32
    return (dtype,)


def row_shape(normalized_shape: object) -> tuple[int, ...]:
    """`normalized_shape` as a tuple: an integer stands for one dimension."""
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    if not isinstance(sizes, (tuple, list)) or not sizes or not all(map(_is_size, sizes)):
        raise ValueError(
            "`normalized_shape` must be an integer or a non-empty sequence of them, "
            f"got {normalized_shape!r}"
        )
    return tuple(sizes)


def _is_size(size: object) -> bool:
    return isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool)


def make_options(
    *, dims: int, dtype: torch.dtype, eps: float | None, rms: bool, dropout_p: float
) -> Options:
    """Check the scalars of a call as a user gives them and put them in the kernels' form.

    `eps=None` is torch's RMSNorm default: the machine epsilon of the arithmetic.
    """
    if eps is None:
        eps = torch.finfo(compute_dtype(dtype)).eps
    return Options(
        dims=dims,
        eps=checks.expect_finite("eps", eps),
        rms=rms,
        dropout_p=checks.expect_probability("dropout_p", dropout_p),
    )
