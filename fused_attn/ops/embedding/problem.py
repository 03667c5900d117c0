"""What one call is: its tensors, its scalars, and a description that holds no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, higher_order
from .. import dispatch

NO_PADDING = -1


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operator schema and of `_C`."""

    tokens: Tensor  # (*, L) int64, rows of `weight`
    weight: Tensor  # (V, E)
    table: Tensor | None = None  # (P, E), one row a position
    positions: Tensor | None = None  # (*, L) int64, rows of `table`; counted if None
    dropout_rng: Tensor | None = None  # (2,) int64: seed and offset of the dropout


class Options(NamedTuple):
    """The scalars of a call, in the order of the operator schema and of `_C`."""

    scale: float  # of the token's row
    offset: int  # position of the first token where positions are counted
    padding_idx: int  # token whose row gets no gradient; NO_PADDING for none
    dropout_p: float  # of y


@dataclass(frozen=True)
class EmbeddingProblem(dispatch.Described):
    """Everything that decides whether and where a call can run; no tensor, no data.

    Attributes:
        shape, dtype: of y.
        num_tokens: rows of the weight. num_positions: rows of the table, 0 without one.
        weight_dtype, table_dtype: of the operands; None for an absent one.
        operands: names of the optional tensors that the call brings.
        gradients: names of the operands of which a derivative is wanted.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_tokens: int
    num_positions: int
    options: Options
    weight_dtype: torch.dtype
    table_dtype: torch.dtype | None = None
    operands: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    def __str__(self) -> str:
        o = self.options
        parts = [
            f"embedding on {self.device}, {self.dtype}: shape={self.shape}",
            f"num_tokens={self.num_tokens}",
            f"scale={o.scale:g}",
        ]
        if self.table_dtype is not None:
            parts.append(f"num_positions={self.num_positions}")
        if o.offset:
            parts.append(f"offset={o.offset}")
        if o.padding_idx != NO_PADDING:
            parts.append(f"padding_idx={o.padding_idx}")
        if o.dropout_p:
            parts.append(f"dropout_p={o.dropout_p}")
        if self.requires_grad:
            parts.append("with gradient")
        return ", ".join(parts)


def result_dtype(operands: Operands) -> torch.dtype:
    """Of y: that of the weight, promoted with the table's as an addition does."""
    weight, table = operands.weight, operands.table
    return weight.dtype if table is None else torch.promote_types(weight.dtype, table.dtype)


def result_shape(operands: Operands) -> tuple[int, ...]:
    """Of y: (*, L, E)."""
    return (*operands.tokens.shape, operands.weight.shape[1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of all arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_options(
    *, scale: object, offset: object, padding_idx: object, dropout_p: float, num_tokens: int
) -> Options:
    """Check the scalars of a call as a user gives them and put them in the kernels' form."""
    padding = NO_PADDING
    if padding_idx is not None:
        padding = checks.expect_integer("padding_idx", padding_idx)
        if not -num_tokens <= padding < num_tokens:
            raise ValueError(
                f"`padding_idx` must be in [{-num_tokens}, {num_tokens}), got {padding}"
            )
        padding %= num_tokens
    return Options(
        checks.expect_finite("scale", scale),
        checks.expect_integer("offset", offset, least=0),
        padding,
        checks.expect_probability("dropout_p", dropout_p),
    )


def describe(operands: Operands, options: Options) -> EmbeddingProblem:
    """Check `operands` against each other and `options`; describe the call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    tokens, weight, table, positions, rng = operands
    checks.expect_tensor("tokens", tokens)
    checks.expect_dtype("tokens", tokens, (torch.int64,))
    if tokens.dim() == 0:
        raise ValueError("`tokens` must have at least 1 dimension, got shape ()")
    if table is not None:
        _check_table(table, weight, tokens, positions, options)
    elif positions is not None:
        raise ValueError("`positions` must be None where there is no `table`")
    if positions is not None:
        checks.expect_shape("positions", positions, tuple(tokens.shape), "that of `tokens`")
        checks.expect_dtype("positions", positions, (torch.int64,))
        if options.offset:
            raise ValueError(f"`offset` must be 0 beside `positions`, got {options.offset}")
    if rng is not None:
        checks.expect_shape("dropout_rng", rng, (2,), "(2,)")
        checks.expect_dtype("dropout_rng", rng, (torch.int64,))
    named = (("tokens", tokens), ("table", table), ("positions", positions), ("dropout_rng", rng))
    for name, operand in named:
        if operand is not None:
            checks.expect_device(name, operand, weight.device)
    return EmbeddingProblem(
        device=weight.device,
        dtype=result_dtype(operands),
        shape=result_shape(operands),
        num_tokens=weight.shape[0],
        num_positions=0 if table is None else table.shape[0],
        options=options,
        weight_dtype=weight.dtype,
        table_dtype=None if table is None else table.dtype,
        operands=checks.present(operands),
        gradients=higher_order.wanted_of(operands),
    )


def check_weight(weight: object) -> None:
    """What the scalars are checked against must be right first."""
    checks.expect_tensor("weight", weight)
    assert isinstance(weight, Tensor)
    checks.expect_rank("weight", weight, 2, "(V, E)")
    checks.expect_dtype("weight", weight, checks.FLOAT_DTYPES)


def _check_table(
    table: Tensor, weight: Tensor, tokens: Tensor, positions: Tensor | None, options: Options
) -> None:
    checks.expect_rank("table", table, 2, "(P, E)")
    checks.expect_dtype("table", table, checks.FLOAT_DTYPES)
    if table.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`table` must have rows of {weight.shape[1]} as `weight`, "
            f"got shape {tuple(table.shape)}"
        )
    length = tokens.shape[-1]
    if positions is None and options.offset + length > table.shape[0]:
        raise ValueError(
            f"`table` must have a row for each of the {options.offset + length} positions "
            f"(offset {options.offset} + length {length}), got {table.shape[0]}"
        )
