"""What Triton kernels that go through the rows of a tensor share; imports Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import philox


class View(NamedTuple):
    """A tensor as rows: pointer and strides of rows and columns."""

    ptr: Any
    strides: Any
    last: Any = 1  # Triton 3.5 loses a constant deep within, a stride of 1, if none comes after it


class Dropout(NamedTuple):
    """Which elements of x are dropped, and what the kept ones are multiplied by."""

    rng: Any  # (2,) int64 or None
    threshold: Any  # a word is kept iff it is at least this (uint32 as int32)
    scale: Any  # 0: nothing is kept


@triton.jit
def load(view, rows, cols, inside):
    """A tile of a tensor as float32, 0 outside."""
    pointers = view.ptr + rows.to(tl.int64) * view.strides[0] + cols.to(tl.int64) * view.strides[1]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(view, rows, cols, values, inside):
    """Write a tile, rounded to the tensor's dtype."""
    pointers = view.ptr + rows.to(tl.int64) * view.strides[0] + cols.to(tl.int64) * view.strides[1]
    tl.store(pointers, values.to(view.ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(vector, cols, width):
    """weight or bias as a row of float32."""
    return tl.load(vector.ptr + cols.to(tl.int64) * vector.strides[0], mask=cols < width,
                   other=0.0).to(tl.float32)  # fmt: skip


@triton.jit
def drop(x, row0, col0, dropout, ROWS: tl.constexpr, COLS: tl.constexpr):
    """X where it is kept, scaled, else 0: one draw for four neighbouring columns.

    The counter is that of `philox.kept_in_rows`: every backend draws the same.
    """
    seed = tl.load(dropout.rng)
    offset = tl.load(dropout.rng + 1).to(tl.uint32)
    row = (row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    quad = (col0 // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)
    zero = tl.zeros([ROWS, COLS // 4], tl.uint32)
    low, high = zero + row.to(tl.uint32), zero + (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + quad[None, :], low, high, zero + offset)
    limit = dropout.threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    keep = tl.reshape(tl.join(even, odd), [ROWS, COLS])
    return tl.where((keep != 0) & (dropout.scale != 0.0), x * dropout.scale, 0.0)


def rows_of(tensor: Tensor | None, shape: tuple[int, int]) -> View | None:
    """A tensor of any strides as rows; copied only where one stride per dimension cannot say it."""
    if tensor is None:
        return None
    matrix = tensor.reshape(shape)
    return View(matrix, matrix.stride())


def vector_of(tensor: Tensor | None) -> View | None:
    """weight or bias as one row."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    return View(flat, flat.stride())


def dropout_of(rng: Tensor | None, dropout_p: float) -> Dropout:
    """Which elements go, in the kernels' form."""
    if rng is None:
        return Dropout(None, 0, 1.0)
    if dropout_p >= 1.0:
        return Dropout(rng, 0, 0.0)
    threshold = philox.threshold(dropout_p)
    signed = threshold - (1 << 32 if threshold >= 1 << 31 else 0)
    return Dropout(rng, signed, 1.0 / (1.0 - dropout_p))


class Result:
    """A tensor to write rows to: itself, or a stand-in where its strides don't make rows."""

    def __init__(self, tensor: Tensor | None, shape: tuple[int, int]) -> None:
        self._tensor, self._stand_in, self.view = tensor, None, None
        if tensor is None:
            return
        try:
            matrix = tensor.view(shape)
        except RuntimeError:
            matrix = self._stand_in = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        self.view = View(matrix, matrix.stride())

    def finish(self) -> None:
        """Bring what was written to the tensor."""
        if self._tensor is not None and self._stand_in is not None:
            self._tensor.copy_(self._stand_in.view(self._tensor.shape))
