"""Forward: y = norm(dropout(x) + residual) * weight + bias, and the sum, one pass over the rows.

Ba, Kiros, Hinton 2016, equation 4; Zhang, Sennrich 2019, equation 4. A tile of whole rows stays in
registers, so that the variance is that of the centred row; wider rows are read in chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton.rows import drop, load, load_vector, store


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
