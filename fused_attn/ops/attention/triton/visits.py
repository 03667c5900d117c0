"""Which tiles mask and documents show anything of: listed beforehand, others are not visited.

A mask is read once, into a map of its cells of GRAIN x GRAIN; that of documents comes from the ids
of so many queries and keys. From the map, which is 1/256 of the scores,
each kernel gets lists for the tiles that it walks through: (mask's batch, mask's heads, own tiles)
rows of `2 * half` numbers, in the first half the tiles to visit in ascending order, in the second
how many of them come before each tile. So a walk over the tiles [a, b) is one over the places
[before[a], before[b]) of the list, and no branch stands around the products. Sizes follow from
those of the tensors alone: nothing is read back, and a captured CUDA graph stays right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....runtime.triton import device as triton_device
from .primitives import ScoreView, Visits, stride_of

GRAIN = 16  # no tile is smaller
_CHUNK = 64  # tiles that a program looks at together


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_cols"])
def _mask_cells_kernel(
    mask, cells, num_heads, num_rows, num_cols, GRAIN: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Cells that show anything, of 4 GRAIN rows and 16 GRAIN columns of the mask."""
    if ALIGNED:  # so that the compiler knows, and loads 16 bytes at a time
        num_cols = num_cols // 16 * 16
    ROWS: tl.constexpr = 4 * GRAIN
    COLS: tl.constexpr = 16 * GRAIN
    across, down = tl.cdiv(num_cols, COLS), tl.cdiv(num_rows, ROWS)
    block, program = tl.program_id(0) % across, tl.program_id(0) // across
    strip, plane = program % down, program // down
    row = (strip * ROWS + tl.arange(0, ROWS))[:, None]
    col = (block * COLS + tl.arange(0, COLS))[None, :]
    pointers = mask.ptr + (plane // num_heads).to(tl.int64) * stride_of(mask, 0, ALIGNED)
    pointers += (plane % num_heads).to(tl.int64) * stride_of(mask, 1, ALIGNED)
    pointers += row.to(tl.int64) * stride_of(mask, 2, ALIGNED)
    pointers += col.to(tl.int64) * mask.strides[3]
    shown = tl.load(pointers, mask=(row < num_rows) & (col < num_cols), other=0) != 0
    shown = tl.reshape(shown.to(tl.int32), [4, GRAIN, 16, GRAIN])
    shown = tl.max(tl.max(shown, 3), 1)
    rows, cols = tl.cdiv(num_rows, GRAIN), tl.cdiv(num_cols, GRAIN)
    i, j = strip * 4 + tl.arange(0, 4)[:, None], block * 16 + tl.arange(0, 16)[None, :]
    target = cells + (plane.to(tl.int64) * rows + i) * cols + j
    tl.store(target, shown.to(tl.uint8), mask=(i < rows) & (j < cols))


@triton.jit(
    do_not_specialize=[
        *("own_tiles", "own_cells", "other_cells", "stride_plane", "stride_own", "stride_other"),
        "half",
    ]
)
def _mask_visits_kernel(
    cells, lists, own_tiles, own_cells, other_cells, stride_plane, stride_own, stride_other, half,
    OWN: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one own tile; tiles are OWN and OTHER cells long."""
    plane, tile = tl.program_id(0) // own_tiles, tl.program_id(0) % own_tiles
    own = (tile * OWN + tl.arange(0, OWN))[:, None, None]
    of_tile = tl.arange(0, OTHER)[None, None, :]
    first = cells + plane.to(tl.int64) * stride_plane
    places = lists + tl.program_id(0).to(tl.int64) * 2 * half
    count = tile * 0
    for start in tl.range(0, half, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other = others[None, :, None] * OTHER + of_tile
        inside = (own < own_cells) & (other < other_cells)
        pointers = first + own.to(tl.int64) * stride_own + other.to(tl.int64) * stride_other
        shown = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        shown = tl.max(tl.max(shown, 2), 0)
        place = count + tl.cumsum(shown, 0) - shown
        tl.store(places + half + others, place, mask=others < half)
        tl.store(places + place, others, mask=shown != 0)
        count += tl.sum(shown, 0)


class Cells(NamedTuple):
    """The map of a mask, of documents or of both."""

    cells: Tensor  # (batch, heads, rows of cells, columns of cells) uint8
    whole: tuple[int, int]  # rows and columns of cells of the scores; 1 above if broadcast


def own_sizes(mask: Tensor) -> tuple[int, ...]:
    """The sizes of what a mask really holds: 1 in each dimension that it is broadcast over."""
    strides = zip(mask.shape, mask.stride(), strict=True)
    return tuple([1 if stride == 0 else size for size, stride in strides])


def mask_cells(mask: Tensor, view: ScoreView, seqlen_q: int, seqlen_k: int, aligned: bool) -> Cells:
    """Read a mask once.

    Args:
        aligned: its rows start at multiples of 16 elements.
    """
    batch, num_heads, rows, cols = own_sizes(mask)
    whole = (triton.cdiv(seqlen_q, GRAIN), triton.cdiv(seqlen_k, GRAIN))
    shape = (batch, num_heads, triton.cdiv(rows, GRAIN), triton.cdiv(cols, GRAIN))
    cells = torch.empty(shape, dtype=torch.uint8, device=mask.device)
    programs = batch * num_heads * triton.cdiv(rows, 4 * GRAIN) * triton.cdiv(cols, 16 * GRAIN)
    triton_device.launch(
        _mask_cells_kernel,
        programs,
        *(view, cells, num_heads, rows, cols, GRAIN, aligned and cols % 16 == 0),
        warps=4,
        stages=1,
    )
    return Cells(cells, whole)


def document_cells(query_ids: Tensor, key_ids: Tensor) -> Cells:
    """Cells in which the spans of the ids meet: where ids ascend, no more than must be visited."""
    (low_q, high_q), (low_k, high_k) = _spans(query_ids), _spans(key_ids)
    shown = (low_q[:, :, None] <= high_k[:, None]) & (low_k[:, None] <= high_q[:, :, None])
    return Cells(shown[:, None].to(torch.uint8), (shown.shape[1], shown.shape[2]))


def _spans(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest of each GRAIN ids of a row."""
    missing = -ids.shape[1] % GRAIN
    if missing:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1)
    return ids.reshape(ids.shape[0], ids.shape[1] // GRAIN, GRAIN).aminmax(dim=2)


def meet(known: Cells, others: Cells) -> Cells:
    """Cells that both show."""
    return Cells((known.cells & others.cells).contiguous(), known.whole)


def visits(known: Cells, block_m: int, block_n: int, of_keys: bool) -> Visits:
    """Lists of key tiles for each tile of queries; `of_keys`: of query tiles for each of keys."""
    batch, num_heads, *held = known.cells.shape
    blocks, axes = (block_m, block_n), (2, 3)
    own, other = (1, 0) if of_keys else (0, 1)
    # One row of cells stands for all rows if the mask is broadcast over them.
    broadcast = [size == 1 for size in held]
    strides = [0 if broadcast[axis] else known.cells.stride(axes[axis]) for axis in (own, other)]
    own_tiles = 1 if broadcast[own] else triton.cdiv(held[own] * GRAIN, blocks[own])
    tiles = triton.cdiv(known.whole[other] * GRAIN, blocks[other])
    half = 16 * triton.cdiv(tiles + 1, 16)  # a multiple: kernels are specialised on that
    shape = (batch, num_heads, own_tiles, 2 * half)
    lists = torch.empty(shape, dtype=torch.int32, device=known.cells.device)
    triton_device.launch(
        _mask_visits_kernel,
        math.prod(shape[:3]),
        *(known.cells, lists, own_tiles, held[own], known.whole[other]),
        *(known.cells.stride(1), *strides, half),
        *(blocks[own] // GRAIN, blocks[other] // GRAIN, _CHUNK),
        warps=4,
        stages=1,
    )
    row = 2 * half
    steps = [
        0 if size == 1 else row * step
        for size, step in zip(shape[:3], (num_heads * own_tiles, own_tiles, 1), strict=True)
    ]
    return Visits(lists, tuple(steps), half)
