"""Backward: gradients of x and residual, row by row; of weight and bias, as partial sums.

A fixed number of programs walks over the rows. Each keeps its sums of the parameters' gradients in
registers and writes them once; adding up the programs' sums is left to torch. No atomic additions:
results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton.rows import Dropout, drop, load, load_vector, store
from .forward import load_sum


@triton.jit
def _normalised(x, residual, dropout, weight, mean, rstd, dy, row0, col0, num_rows, width,
                SUMMED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
                COLS: tl.constexpr):  # fmt: skip
    """(normalised rows, dy, dy * weight) of a tile, all 0 outside."""
    rows = row0 + tl.arange(0, ROWS)
    cols = col0 + tl.arange(0, COLS)
    inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
    if SUMMED:  # x is the sum
        h = load(x, rows[:, None], cols[None, :], inside)
    else:
        h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
    scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
    if mean is not None:
        # A quarter of each: the difference of two huge numbers may be too large for float32.
        h = h * 0.25 - tl.load(mean + rows, mask=rows < num_rows, other=0.0)[:, None] * 0.25
        scale = scale * 4.0
    normalised = tl.where(inside, h * scale, 0.0)
    gradient = load(dy, rows[:, None], cols[None, :], inside)
    weighted = gradient
    if weight is not None:
        weighted = gradient * load_vector(weight, cols, width)[None, :]
    return normalised, gradient, weighted


@triton.jit
def _write_gradients(dx, dresidual, dh, dropout, normalised, weighted, shift, slope, rstd, row0,
                     col0, num_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """One tile of dx and dresidual: rstd (dy w - shift - normalised slope) + dh."""
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = (col0 + tl.arange(0, COLS))[None, :]
    inside = (rows < num_rows) & (cols < width)
    scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
    total = scale * (weighted - shift[:, None] - normalised * slope[:, None])
    if dh is not None:
        total += load(dh, rows, cols, inside)
    if dresidual is not None:
        store(dresidual, rows, cols, total, inside)
    if dx is not None:
        if dropout.rng is not None:
            total = drop(total, row0, col0, dropout, ROWS, COLS)
        store(dx, rows, cols, total, inside)


@triton.jit(do_not_specialize=["threshold", "drop_scale", "num_rows", "width"])
def _layer_norm_backward_kernel(
    x, residual, weight, rng, threshold, drop_scale, mean, rstd, dy, dh, dx, dresidual, dweights,
    dbiases, num_rows, width, SUMMED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Every `num_programs`-th tile of whole rows, and their sums for weight and bias."""
    dropout = Dropout(rng, threshold, drop_scale)
    program, programs = tl.program_id(0), tl.num_programs(0)
    dweight = tl.zeros([COLS], tl.float32)
    dbias = tl.zeros([COLS], tl.float32)
    # Registers are scarce with a dropout: nothing more is kept from row to row.
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), programs, disable_licm=not SUMMED):
        row0 = tile * ROWS
        normalised, gradient, weighted = _normalised(
            x, residual, dropout, weight, mean, rstd, dy, row0, 0, num_rows, width, SUMMED, DTYPE,
            ROWS, COLS,
        )  # fmt: skip
        if dweights is not None:
            dweight += tl.sum(gradient * normalised, 0)
        if dbiases is not None:
            dbias += tl.sum(gradient, 0)
        if (dx is not None) or (dresidual is not None):
            shift = tl.zeros([ROWS], tl.float32)
            if mean is not None:
                shift = tl.sum(weighted, 1) / width
            slope = tl.sum(weighted * normalised, 1) / width
            _write_gradients(dx, dresidual, dh, dropout, normalised, weighted, shift, slope, rstd,
                             row0, 0, num_rows, width, ROWS, COLS)  # fmt: skip
    cols = tl.arange(0, COLS)
    at = program.to(tl.int64) * width + cols
    if dweights is not None:
        tl.store(dweights + at, dweight, mask=cols < width)
    if dbiases is not None:
        tl.store(dbiases + at, dbias, mask=cols < width)


@triton.jit(do_not_specialize=["threshold", "drop_scale", "num_rows", "width"])
def _layer_norm_backward_wide_kernel(
    x, residual, weight, rng, threshold, drop_scale, mean, rstd, dy, dh, dx, dresidual, num_rows,
    width, SUMMED: tl.constexpr, DTYPE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of one row that is wider than a tile: first its two means, then the row."""
    dropout = Dropout(rng, threshold, drop_scale)
    row0 = tl.program_id(0)
    shift = tl.zeros([1], tl.float32)
    slope = tl.zeros([1], tl.float32)
    for col0 in tl.range(0, width, COLS):
        normalised, _, weighted = _normalised(
            x, residual, dropout, weight, mean, rstd, dy, row0, col0, num_rows, width, SUMMED,
            DTYPE, 1, COLS,
        )  # fmt: skip
        if mean is not None:
            shift += tl.sum(weighted, 1)
        slope += tl.sum(weighted * normalised, 1)
    for col0 in tl.range(0, width, COLS):
        normalised, _, weighted = _normalised(
            x, residual, dropout, weight, mean, rstd, dy, row0, col0, num_rows, width, SUMMED,
            DTYPE, 1, COLS,
        )  # fmt: skip
        _write_gradients(dx, dresidual, dh, dropout, normalised, weighted, shift / width,
                         slope / width, rstd, row0, col0, num_rows, width, 1, COLS)  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "drop_scale", "num_rows", "width"])
def _layer_norm_backward_columns_kernel(
    x, residual, rng, threshold, drop_scale, mean, rstd, dy, dweights, dbiases, num_rows, width,
    SUMMED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums for weight and bias of some columns over every SPLITS-th tile of rows."""
    dropout = Dropout(rng, threshold, drop_scale)
    split, col0 = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS) * COLS
    dweight = tl.zeros([COLS], tl.float32)
    dbias = tl.zeros([COLS], tl.float32)
    for tile in tl.range(split, tl.cdiv(num_rows, ROWS), SPLITS):
        normalised, gradient, _ = _normalised(
            x, residual, dropout, None, mean, rstd, dy, tile * ROWS, col0, num_rows, width, SUMMED,
            DTYPE, ROWS, COLS,
        )  # fmt: skip
        dweight += tl.sum(gradient * normalised, 0)
        dbias += tl.sum(gradient, 0)
    cols = col0 + tl.arange(0, COLS)
    at = split * width + cols
    if dweights is not None:
        tl.store(dweights + at, dweight, mask=cols < width)
    if dbiases is not None:
        tl.store(dbiases + at, dbias, mask=cols < width)
