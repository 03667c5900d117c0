"""Positional encodings: fixed sinusoids, learned rows, and rotation of queries and keys."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..runtime import checks, sequence


class PositionalEncoding(nn.Module):
    """A table of one row a position, added to a sequence; base of the two classes below.

    Attributes:
        table: (max_len, d_model).
    """

    table: Tensor

    def __init__(self, d_model: int, max_len: int) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("max_len", max_len)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive int, got {value!r}")
        self.d_model, self.max_len = d_model, max_len

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (*, L, d_model) + rows offset .. offset + L of the table.

        Raises:
            ValueError: there are fewer than offset + L rows, or x has another width.
        """
        checks.expect_tensor("x", x)
        if x.dim() < 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"`x` must be (*, L, {self.d_model}), got shape {tuple(x.shape)}")
        length = x.shape[-2]
        if offset < 0 or offset + length > self.max_len:
            raise ValueError(
                f"positions must be in [0, max_len = {self.max_len}), "
                f"got {offset} .. {offset + length - 1}"
            )
        rows = sequence.rows_of(self.max_len, length, offset, x.device)
        found = self.table[offset : offset + length] if rows is None else self.table[rows]
        return x + found.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}"


class SinusoidalPositionalEncoding(PositionalEncoding):
    """Fixed sinusoids (Vaswani et al. 2017, section 3.5); no parameters, nothing in the state_dict.

    table[p, 2 i] = sin(p / 10000^(2 i / d_model)), table[p, 2 i + 1] = cos of the same.

    Args:
        d_model: features of a position; any number.
        max_len: number of positions.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, max_len)
        position = torch.arange(max_len, dtype=torch.float64)[:, None]
        frequency = torch.exp(
            torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model)
        )
        table = torch.empty(max_len, d_model, dtype=torch.float64)
        table[:, 0::2] = torch.sin(position * frequency)
        table[:, 1::2] = torch.cos(position * frequency)[:, : d_model // 2]
        table = table.to(device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)


class LearnedPositionalEncoding(PositionalEncoding):
    """A learned row for each position.

    Args:
        d_model: features of a position.
        max_len: number of positions.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 512,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, max_len)
        self.table = nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as Devlin et al. 2018 ("BERT")."""
        nn.init.normal_(self.table, std=0.02)


def check_rotary(base: float | None, head_dim: int) -> float | None:
    """`base` if heads of `head_dim` features can be rotated with it; None stays None.

    Raises:
        TypeError, ValueError: `base` is no positive number, or `head_dim` is odd.
    """
    if base is None:
        return None
    number = checks.expect_finite("rotary_base", base)
    if number <= 0.0:
        raise ValueError(f"`rotary_base` must be positive, got {number}")
    if head_dim % 2 != 0:
        _odd(head_dim)
    return number


def _odd(head_dim: int) -> NoReturn:
    raise ValueError(f"`rotary_base` needs an even head size, got {head_dim}")


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021, "RoFormer", equation 34).

    Features i and i + D / 2 of a head at position p turn by the angle p / base^(2 i / D). Angles
    are float32 (float64 for float64), the result is rounded once.

    Args:
        x: (..., D), D even.
        positions: int64, broadcastable to x.shape[:-1].
    """
    half = x.shape[-1] // 2
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Angles of large positions need more digits than float32 has; cos and sin do not.
    exponent = torch.arange(half, device=x.device, dtype=torch.float64) * (-2.0 / x.shape[-1])
    angle = positions[..., None].to(torch.float64) * torch.pow(base, exponent)
    cos, sin = torch.cos(angle).to(compute), torch.sin(angle).to(compute)
    first, second = x[..., :half].to(compute), x[..., half:].to(compute)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
