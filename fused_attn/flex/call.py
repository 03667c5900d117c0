"""What is the same in all blocks of a call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .blocks import Row, rows_of
from .expression import Expression


@dataclass(eq=False)
class Call:
    """The functions of a call, and where they apply.

    Attributes:
        score, mask: the functions, or None.
        block_mask: a BlockMask, a mask function, or None.
        lengths: Lq and Lk.
        scale: of the scores.
        adds: the change of scores is softcap * tanh(score / softcap) + what it makes of 0.
        softcap: that cap, or None.
    """

    score: Expression | None
    mask: Expression | None
    block_mask: Any
    lengths: tuple[int, int]
    scale: float
    adds: bool
    softcap: float | None

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The blocks of queries."""
        return rows_of(self.block_mask, *self.lengths)

    def captured(self) -> list[Tensor]:
        return [x for e in (self.score, self.mask) if e is not None for x in e.captured]

    def split(self, captured: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Captured tensors of the change of scores, and those of the mask."""
        number = 0 if self.score is None else len(self.score.captured)
        return list(captured[:number]), list(captured[number:])
