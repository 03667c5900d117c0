"""Tensors of random calls: in every layout, with memory around them that must not matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VALUES = ("normal", "large", "small", "zeros", "steps")


class Maker:
    """Makes the tensors of one case, the same for the same seed."""

    def __init__(self, seed: int, dtype: str, device: str, values: str = "normal") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = device
        self.values = values

    def floats(
        self, shape: Sequence[int], layout: str = "contiguous", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Random numbers; what lies beside them in memory is NaN."""
        x = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        if self.values == "large":
            x = x * 16.0
        elif self.values == "small":
            x = x * 2.0**-12
        elif self.values == "zeros":
            x = torch.where(x > 0, x, 0.0)
        elif self.values == "steps":  # ties
            x = x.round()
        return laid_out(x.to(self.device, dtype or self.dtype), layout)

    def bools(self, shape: Sequence[int], density: float, tile: int | None = None) -> Tensor:
        """True with that probability; only in half of the tiles, if there are any."""
        drawn = torch.rand(tuple(shape), generator=self.generator) < density
        if tile is not None and len(shape) >= 2:
            rows, columns = (-(-n // tile) for n in shape[-2:])
            coarse = torch.rand((*shape[:-2], rows, columns), generator=self.generator) < 0.5
            fine = coarse.repeat_interleave(tile, -2).repeat_interleave(tile, -1)
            drawn &= fine[..., : shape[-2], : shape[-1]]
        return drawn.to(self.device)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """In [low, high)."""
        drawn = torch.randint(low, max(high, low + 1), tuple(shape), generator=self.generator)
        return drawn.to(self.device)

    def rng(self) -> Tensor:
        """Seed and offset of a dropout."""
        return self.integers(0, 2**62, (2,))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and x.dim() >= 1:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "sliced" and x.dim() >= 1:
        around = x.new_full([n + 2 for n in x.shape], torch.nan)
        inside = around[tuple(slice(1, 1 + n) for n in x.shape)]
        inside.copy_(x)
        return inside
    if layout == "expanded" and x.dim() >= 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def guarded_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """(a place for a result like x, all of the memory around it), NaN inside and 7 around."""
    around = x.new_full([n + 2 for n in x.shape], 7.0)
    inside = around[tuple(slice(1, 1 + n) for n in x.shape)]
    inside.fill_(torch.nan)
    return inside, around


def is_untouched(around: Tensor, inside: Tensor) -> bool:
    """Whether the memory around is as it was."""
    copy = around.clone()
    copy[tuple(slice(1, 1 + n) for n in inside.shape)] = 7.0
    return bool((copy == 7.0).all())
