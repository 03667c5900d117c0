"""Lists of the tiles that are seen wholly, and of those that are seen in part.

From a map of classes of cells of GRAIN x GRAIN (`classify.py`): 0 where nothing is seen, 2 where
all is, 1 else. Each kernel gets the lists for the tiles that it walks through: first come those in
which no mask code runs, then the others. Both take numbers of the order of the tiles, and nothing
is read back.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....runtime.triton import device as triton_device
from .primitives import ClassLists
from .tiles import AttentionTile
from .visits import GRAIN, Cells

_CHUNK = 64  # tiles that a program looks at together


@triton.jit
def _append(places, count, first, own, own_cells, other_cells, stride_own, stride_other, others,
            CLASS: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Write the numbers of the tiles of one class after `count` others; the new count."""
    of_tile = tl.arange(0, OTHER)[None, None, :]
    for start in tl.range(0, others, CHUNK):
        number = start + tl.arange(0, CHUNK)
        other = number[None, :, None] * OTHER + of_tile
        pointers = first + own.to(tl.int64) * stride_own + other.to(tl.int64) * stride_other
        inside = (own < own_cells) & (other < other_cells)
        cells = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        some = tl.max(tl.max(cells, 2), 0) > 0
        whole = tl.min(tl.min(cells, 2), 0) == 2
        mine = (whole if CLASS == 2 else some & (whole == 0)).to(tl.int32)
        tl.store(places + count + tl.cumsum(mine, 0) - mine, number, mask=mine != 0)
        count += tl.sum(mine, 0)
    return count


@triton.jit(
    do_not_specialize=[
        *("own_tiles", "own_cells", "other_cells", "stride_plane", "stride_own", "stride_other"),
        *("others", "length"),
    ]
)
def _attention_class_lists_kernel(
    cells, lists, own_tiles, own_cells, other_cells, stride_plane, stride_own, stride_other, others,
    length, OWN: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one own tile: two counts, then tiles; tiles are OWN and OTHER cells long."""
    plane, tile = tl.program_id(0) // own_tiles, tl.program_id(0) % own_tiles
    own = (tile * OWN + tl.arange(0, OWN))[:, None, None]
    first = cells + plane.to(tl.int64) * stride_plane
    row = lists + tl.program_id(0).to(tl.int64) * length
    full = _append(row + 2, tile * 0, first, own, own_cells, other_cells, stride_own, stride_other,
                   others, 2, OTHER, CHUNK)  # fmt: skip
    every = _append(row + 2, full, first, own, own_cells, other_cells, stride_own, stride_other,
                    others, 1, OTHER, CHUNK)  # fmt: skip
    tl.store(row, full)
    tl.store(row + 1, every)


class ClassMap:
    """The classes of all cells, and the lists that kernels got so far."""

    def __init__(self, cells: Tensor, whole: tuple[int, int]) -> None:
        self._cells = Cells(cells, whole)
        self._lists: dict[tuple[int, int, bool], ClassLists] = {}

    def shown(self) -> Cells:
        """Cells of which anything is seen."""
        return Cells((self._cells.cells != 0).to(torch.uint8), self._cells.whole)

    def lists(self, tile: AttentionTile, of_keys: bool) -> ClassLists:
        """For each tile of queries those of keys; `of_keys`: for each of keys those of queries."""
        key = (tile.block_m, tile.block_n, of_keys)
        if key not in self._lists:
            self._lists[key] = _lists(self._cells.cells, *key)
        return self._lists[key]


def _lists(cells: Tensor, block_m: int, block_n: int, of_keys: bool) -> ClassLists:
    batch, num_heads, *held = cells.shape
    own, other = (1, 0) if of_keys else (0, 1)
    blocks = (block_m // GRAIN, block_n // GRAIN)
    own_tiles, others = (triton.cdiv(held[axis], blocks[axis]) for axis in (own, other))
    row = 16 * triton.cdiv(others + 2, 16)  # a multiple: kernels are specialised on that
    shape = (batch, num_heads, own_tiles, row)
    lists = torch.empty(shape, dtype=torch.int32, device=cells.device)
    strides = cells.stride()
    triton_device.launch(
        _attention_class_lists_kernel,
        math.prod(shape[:3]),
        *(cells, lists, own_tiles, held[own], held[other], strides[1]),
        *(strides[2 + own], strides[2 + other], others, shape[3]),
        *(blocks[own], blocks[other], _CHUNK),
        warps=4,
        stages=1,
    )
    steps = zip(shape[:3], lists.stride(), strict=False)
    return ClassLists(lists, tuple(0 if size == 1 else step for size, step in steps))
