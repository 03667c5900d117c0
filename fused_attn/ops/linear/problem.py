"""What one call is: its tensors, its scalars, and a description that holds no tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, higher_order
from .. import dispatch


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operator schema and of `_C`."""

    x: Tensor  # (*, in)
    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)


class Options(NamedTuple):
    """The scalars of a call: there are none."""


@dataclass(frozen=True)
class LinearProblem(dispatch.Described):
    """Everything that decides whether and where a call can run; no tensor, no data.

    Attributes:
        shape: of y. dtype: of everything.
        rows: of x, without its last dimension. width_in: of a row of x. width_out: of a row of y.
        operands: names of the optional tensors that the call brings.
        gradients: names of the operands of which a derivative is wanted.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int
    width_in: int
    width_out: int
    operands: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"linear on {self.device}, {self.dtype}: rows={self.rows}",
            f"in={self.width_in}",
            f"out={self.width_out}",
            *self.operands,
        ]
        if self.requires_grad:
            parts.append("with gradient")
        return ", ".join(parts)


def result_shape(operands: Operands) -> tuple[int, ...]:
    """Of y."""
    return (*operands.x.shape[:-1], operands.weight.shape[0])


def describe(operands: Operands) -> LinearProblem:
    """Check `operands` against each other; describe the call.

    Raises:
        TypeError: an operand is no tensor.
        RuntimeError: shapes, dtypes or devices do not fit, as torch's linear says it.
    """
    x, weight, bias = operands
    for name, operand in (("x", x), ("weight", weight), ("bias", bias)):
        if operand is not None or name != "bias":
            checks.expect_tensor(name, operand)
    checks.expect_dtype("x", x, checks.FLOAT_DTYPES)
    _expect(x.dim() >= 1, "x", "have at least 1 dimension", tuple(x.shape))
    _expect(weight.dim() == 2, "weight", "have shape (out, in)", tuple(weight.shape))
    width_out, width_in = weight.shape
    _expect(x.shape[-1] == width_in, "x", f"end in the weight's {width_in} columns", tuple(x.shape))
    if bias is not None:
        wanted = f"have shape (out,) = ({width_out},)"
        _expect(tuple(bias.shape) == (width_out,), "bias", wanted, tuple(bias.shape))
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None:
            _expect(operand.dtype == x.dtype, name, f"be {x.dtype}, as `x` is", operand.dtype)
            _expect(
                operand.device == x.device, name, f"be on {x.device}, as `x` is", operand.device
            )
    return LinearProblem(
        device=x.device,
        dtype=x.dtype,
        shape=result_shape(operands),
        rows=math.prod(x.shape[:-1]),
        width_in=width_in,
        width_out=width_out,
        operands=checks.present(operands),
        gradients=higher_order.wanted_of(operands),
    )


def _expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise RuntimeError(f"`{name}` must {expected}, got {got}")
