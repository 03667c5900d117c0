"""Forward: y = norm(dropout(x) + residual) * weight + bias, and the sum, one pass over the rows.

Ba, Kiros, Hinton 2016, equation 4; Zhang, Sennrich 2019, equation 4. A tile of whole rows stays in
registers, so that the variance is that of the centred row; wider rows are read in chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor as rows: pointer and strides of rows and columns."""

    ptr: Any
    strides: Any


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

    The counter is that of `reference.keep_mask`: every backend draws the same.
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


@triton.jit
def load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """H = dropout(x) + residual as float32, rounded to DTYPE as if it had been stored."""
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = (col0 + tl.arange(0, COLS))[None, :]
    inside = (rows < num_rows) & (cols < width)
    h = load(x, rows, cols, inside)
    if dropout.rng is not None:
        h = drop(h, row0, col0, dropout, ROWS, COLS)
    if residual is not None:
        h += load(residual, rows, cols, inside)
    return h.to(DTYPE).to(tl.float32)


@triton.jit
def _layer_norm_statistics(x, residual, dropout, row0, num_rows, width, eps, DTYPE: tl.constexpr,
                           ROWS: tl.constexpr, COLS: tl.constexpr, RMS: tl.constexpr):  # fmt: skip
    """(mean, 1 / standard deviation) of rows that are wider than a tile."""
    mean = tl.zeros([ROWS], tl.float32)
    if not RMS:
        for col0 in tl.range(0, width, COLS):
            mean += tl.sum(load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS,
                                    COLS), 1)  # fmt: skip
        mean = mean / width
    square = tl.zeros([ROWS], tl.float32)
    for col0 in tl.range(0, width, COLS):
        h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
        inside = (col0 + tl.arange(0, COLS))[None, :] < width
        centred = tl.where(inside, h - mean[:, None], 0.0)
        square += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt_rn(square / width + eps)


@triton.jit
def _write(y, h_out, weight, bias, h, mean, rstd, row0, col0, num_rows, width, ROWS: tl.constexpr,
           COLS: tl.constexpr):  # fmt: skip
    """One tile of y and, if it is wanted, of the sum."""
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = col0 + tl.arange(0, COLS)
    inside = (rows < num_rows) & (cols[None, :] < width)
    if h_out is not None:
        store(h_out, rows, cols[None, :], h, inside)
    result = (h - mean[:, None]) * rstd[:, None]
    if weight is not None:
        result = result * load_vector(weight, cols, width)[None, :]
    if bias is not None:
        result = result + load_vector(bias, cols, width)[None, :]
    store(y, rows, cols[None, :], result, inside)


@triton.jit(do_not_specialize=["num_rows", "width", "eps", "dropout"])
def _layer_norm_forward_kernel(
    x, residual, weight, bias, dropout, y, h_out, mean_out, rstd_out, num_rows, width, eps,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RMS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows; WHOLE: a tile holds all of a row."""
    row0 = tl.program_id(0) * ROWS
    if WHOLE:
        h = load_sum(x, residual, dropout, row0, 0, num_rows, width, DTYPE, ROWS, COLS)
        mean = tl.zeros([ROWS], tl.float32)
        if not RMS:
            mean = tl.sum(h, 1) / width
        centred = tl.where(tl.arange(0, COLS)[None, :] < width, h - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
        _write(y, h_out, weight, bias, h, mean, rstd, row0, 0, num_rows, width, ROWS, COLS)
    else:
        mean, rstd = _layer_norm_statistics(
            x, residual, dropout, row0, num_rows, width, eps, DTYPE, ROWS, COLS, RMS
        )
        for col0 in tl.range(0, width, COLS):
            h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
            _write(y, h_out, weight, bias, h, mean, rstd, row0, col0, num_rows, width, ROWS, COLS)
    row = row0 + tl.arange(0, ROWS)
    if mean_out is not None:
        tl.store(mean_out + row, mean, mask=row < num_rows)
    if rstd_out is not None:
        tl.store(rstd_out + row, rstd, mask=row < num_rows)
