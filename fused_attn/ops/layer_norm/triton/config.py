"""Tile sizes: a pure function of the width. `benchmarks/compiler` compiles every line."""

from __future__ import annotations

from typing import NamedTuple

from ....runtime.triton.device import INTERPRETER

# Wider rows do not stay in registers: they are read again, from the cache, in chunks of this size.
WIDEST_TILE = 8192
_ELEMENTS = 2048  # of a tile of several short rows
_INTERPRETED_ELEMENTS = 1 << 14  # the interpreter's time goes by operations, whatever their size


class RowTile(NamedTuple):
    """Rows and columns of one tile, and the warps of a program."""

    rows: int
    cols: int
    warps: int

    def fits(self, width: int) -> bool:
        """True if a tile holds whole rows."""
        return self.cols >= width


def tile(width: int, arch: int, backward: bool = False) -> RowTile:
    """Tile of a row-wise kernel."""
    elements = _INTERPRETED_ELEMENTS if arch == INTERPRETER else _ELEMENTS
    cols = min(max(16, 1 << (width - 1).bit_length()), WIDEST_TILE)
    warps = max(4, cols // 512)
    # The widest rows take all registers: the compiler was seen to spill none of them with these.
    if cols == WIDEST_TILE and (arch >= 120 or (backward and 80 <= arch < 90)):
        warps *= 2
    return RowTile(max(1, elements // cols), cols, warps)


def programs(rows: int, width: int, arch: int, multiprocessors: int) -> int:
    """Programs of the backward, each with its own partial sums of the parameters' gradients."""
    shape = tile(width, arch)
    per_multiprocessor = min(max(WIDEST_TILE // shape.cols, 1), 8)
    return max(1, min(-(-rows // shape.rows), multiprocessors * per_multiprocessor))
