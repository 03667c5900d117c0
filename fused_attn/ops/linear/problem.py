"""What one call is: its tensors, its scalars, and a description that holds no tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, higher_order
from ...runtime.activations import expect_activation
from .. import dispatch


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operator schema and of `_C`."""

    x: Tensor  # (*, in)
    weight: Tensor  # (out, in), or (2 * out, in) if gated: the gates' rows first
    bias: Tensor | None = None  # (weight.shape[0],)
    residual: Tensor | None = None  # (*, out)
    dropout_rng: Tensor | None = None  # (2,) int64: seed and offset of the dropout


class Options(NamedTuple):
    """The scalars of a call, in the order of the operator schema and of `_C`."""

    activation: str = ""  # one of runtime.activations, or "" for none
    gated: bool = False
    dropout_p: float = 0.0  # of y, before the residual


@dataclass(frozen=True)
class LinearProblem(dispatch.Described):
    """Everything that decides whether and where a call can run; no tensor, no data.

    Attributes:
        shape: of y. dtype: of everything.
        rows: of x, without its last dimension. width_in: of a row of x. width_out: rows of weight.
        operands: names of the optional tensors that the call brings.
        gradients: names of the operands of which a derivative is wanted.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int
    width_in: int
    width_out: int
    options: Options
    operands: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The class of its rows in records of `selftest`: up to 64, or 0 for more."""
        return 64 if self.rows <= 64 else 0

    def __str__(self) -> str:
        parts = [
            f"linear on {self.device}, {self.dtype}: rows={self.rows}",
            f"in={self.width_in}",
            f"out={self.width_out}",
            *self.operands,
        ]
        if self.options.activation:
            parts.append(f"activation={self.options.activation!r}")
        if self.options.gated:
            parts.append("gated")
        if self.options.dropout_p:
            parts.append(f"dropout_p={self.options.dropout_p}")
        if self.requires_grad:
            parts.append("with gradient")
        return ", ".join(parts)


def result_shape(operands: Operands, options: Options) -> tuple[int, ...]:
    """Of y: half of the product's last dimension if gated."""
    width = operands.weight.shape[0]
    return (*operands.x.shape[:-1], width // 2 if options.gated else width)


def make_options(*, activation: object, gated: object, dropout_p: float) -> Options:
    """Check the scalars of a call as a user gives them and put them in the kernels' form."""
    name = "" if activation is None else expect_activation(activation, " or None")
    if not isinstance(gated, bool):
        raise TypeError(f"`gated` must be a bool, got {checks.type_name(gated)}")
    if gated and activation is None:
        raise ValueError("`gated` needs an `activation`, that of the gates; got None")
    return Options(name, gated, checks.expect_probability("dropout_p", dropout_p))


def describe(operands: Operands, options: Options) -> LinearProblem:
    """Check `operands` against each other and `options`; describe the call.

    Raises:
        TypeError: an operand is no tensor.
        RuntimeError: shapes, dtypes or devices do not fit, as torch's linear says it.
    """
    x, weight, bias, residual, rng = operands
    for name, operand in zip(operands._fields[:4], operands, strict=False):
        if operand is not None or name in ("x", "weight"):
            checks.expect_tensor(name, operand)
    checks.expect_dtype("x", x, checks.FLOAT_DTYPES)
    _expect(x.dim() >= 1, "x", "have at least 1 dimension", tuple(x.shape))
    _expect(weight.dim() == 2, "weight", "have shape (out, in)", tuple(weight.shape))
    width_out, width_in = weight.shape
    _expect(x.shape[-1] == width_in, "x", f"end in the weight's {width_in} columns", tuple(x.shape))
    if bias is not None:
        wanted = f"have shape (out,) = ({width_out},)"
        _expect(tuple(bias.shape) == (width_out,), "bias", wanted, tuple(bias.shape))
    if options.gated:
        _expect(width_out % 2 == 0, "weight", "have twice as many rows as y is wide", width_out)
    shape = result_shape(operands, options)
    if residual is not None:
        wanted = f"have y's shape {shape}"
        _expect(tuple(residual.shape) == shape, "residual", wanted, tuple(residual.shape))
    if rng is not None:
        checks.expect_shape("dropout_rng", rng, (2,), "(2,)")
        checks.expect_dtype("dropout_rng", rng, (torch.int64,))
        checks.expect_device("dropout_rng", rng, x.device)
    for name, operand in (("weight", weight), ("bias", bias), ("residual", residual)):
        if operand is not None:
            _expect(operand.dtype == x.dtype, name, f"be {x.dtype}, as `x` is", operand.dtype)
            _expect(
                operand.device == x.device, name, f"be on {x.device}, as `x` is", operand.device
            )
    return LinearProblem(
        device=x.device,
        dtype=x.dtype,
        shape=shape,
        rows=math.prod(x.shape[:-1]),
        width_in=width_in,
        width_out=width_out,
        options=options,
        operands=checks.present(operands),
        gradients=higher_order.wanted_of(operands),
    )


def _expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise RuntimeError(f"`{name}` must {expected}, got {got}")
