"""What one call is: its tensors, its scalars, and a description that holds no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, higher_order
from ...runtime.activations import expect_activation
from .. import dispatch


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operator schema and of `_C`."""

    x: Tensor  # (*, width), or (*, 2 * width) if gated: the gates, then what they are multiplied by
    bias: Tensor | None = None  # (x.shape[-1],)
    dropout_rng: Tensor | None = None  # (2,) int64: seed and offset of the dropout


class Options(NamedTuple):
    """The scalars of a call, in the order of the operator schema and of `_C`."""

    activation: str  # one of ACTIVATIONS
    gated: bool
    dropout_p: float  # of y


@dataclass(frozen=True)
class BiasActivationProblem(dispatch.Described):
    """Everything that decides whether and where a call can run; no tensor, no data.

    Attributes:
        shape, dtype: of y.
        width: elements of a row of y.
        x_dtype, bias_dtype: of the operands; None for an absent one.
        operands: names of the optional tensors that the call brings.
        gradients: names of the operands of which a derivative is wanted.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    width: int
    options: Options
    x_dtype: torch.dtype
    bias_dtype: torch.dtype | None = None
    operands: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    def __str__(self) -> str:
        o = self.options
        parts = [
            f"bias_activation on {self.device}, {self.dtype}: shape={self.shape}",
            f"activation={o.activation!r}",
        ]
        if o.gated:
            parts.append("gated")
        if self.bias_dtype is not None:
            parts.append(f"bias {self.bias_dtype}")
        if o.dropout_p:
            parts.append(f"dropout_p={o.dropout_p}")
        if self.requires_grad:
            parts.append("with gradient")
        return ", ".join(parts)


def result_dtype(operands: Operands) -> torch.dtype:
    """Of y: that of x, promoted with the bias's as `x + bias` does."""
    x, bias, _ = operands
    return x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)


def result_shape(operands: Operands, options: Options) -> tuple[int, ...]:
    """Of y: half of x's last dimension if gated."""
    shape = tuple(operands.x.shape)
    return (*shape[:-1], shape[-1] // 2) if options.gated else shape


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of all arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_options(*, activation: object, gated: object, dropout_p: float) -> Options:
    """Check the scalars of a call as a user gives them and put them in the kernels' form."""
    name = expect_activation(activation)
    if not isinstance(gated, bool):
        raise TypeError(f"`gated` must be a bool, got {checks.type_name(gated)}")
    return Options(name, gated, checks.expect_probability("dropout_p", dropout_p))


def describe(operands: Operands, options: Options) -> BiasActivationProblem:
    """Check `operands` against each other and `options`; describe the call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    x, bias, rng = operands
    checks.expect_tensor("x", x)
    checks.expect_dtype("x", x, checks.FLOAT_DTYPES)
    if x.dim() == 0:
        raise ValueError("`x` must have at least 1 dimension, got shape ()")
    if options.gated and x.shape[-1] % 2 != 0:
        raise ValueError(
            "`x` must have an even last dimension where `gated` is True, "
            f"got shape {tuple(x.shape)}"
        )
    if bias is not None:
        checks.expect_shape("bias", bias, (x.shape[-1],), "(x.shape[-1],)")
        checks.expect_dtype("bias", bias, checks.FLOAT_DTYPES)
    if rng is not None:
        checks.expect_shape("dropout_rng", rng, (2,), "(2,)")
        checks.expect_dtype("dropout_rng", rng, (torch.int64,))
    for name, operand in (("bias", bias), ("dropout_rng", rng)):
        if operand is not None:
            checks.expect_device(name, operand, x.device)
    shape = result_shape(operands, options)
    return BiasActivationProblem(
        device=x.device,
        dtype=result_dtype(operands),
        shape=shape,
        width=shape[-1],
        options=options,
        x_dtype=x.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        operands=checks.present(operands),
        gradients=higher_order.wanted_of(operands),
    )
