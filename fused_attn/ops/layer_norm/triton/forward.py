"""Forward: y = norm(dropout(x) + residual) * weight + bias, and the sum, one pass over the rows.

Ba, Kiros, Hinton 2016, equation 4; Zhang, Sennrich 2019, equation 4. A tile of whole rows stays in
registers, so that the variance is that of the centred row; wider rows are read in chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton.rows import Dropout, drop, load, load_vector, store

# Beyond these a variance is too inexact, or no number at all: the row is scaled first.
SMALLEST, LARGEST = tl.constexpr(1e-30), tl.constexpr(1e37)


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
def _is_extreme(variance):
    """Which rows of a tile have a variance that float32 cannot hold."""
    return ~((variance > SMALLEST) & (variance < LARGEST))


@triton.jit
def _factor(largest, eps):
    """A power of two that brings a row to about 1, by its largest number or by eps.

    It is inexact only where it is not needed: numbers below 1e-38 have fewer bits anyway.
    """
    size = tl.minimum(tl.maximum(tl.maximum(largest, tl.sqrt_rn(eps)), 1e-36), 1e36)
    return tl.exp2(-tl.floor(tl.log2(size)))


@triton.jit
def _statistics_of_tile(h, inside, width, twice, RMS: tl.constexpr, TWICE: tl.constexpr):
    """(mean, variance) of whole rows.

    TWICE: in the rows `twice` the mean of equal numbers is exactly theirs; others do not change.
    """
    mean = tl.zeros_like(tl.sum(h, 1))
    if not RMS:
        mean = tl.sum(h, 1) / width
        if TWICE:
            rest = tl.sum(tl.where(inside, h - mean[:, None], 0.0), 1) / width
            mean += tl.where(twice, rest, 0.0)
    centred = tl.where(inside, h - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, 1) / width


@triton.jit
def _add_eps(variance, factor, eps):
    """(variance + eps, the power of two in its root), of rows times `factor`.

    The size of huge equal numbers says nothing about their deviation: eps alone counts.
    """
    root = tl.sqrt_rn(eps) * factor
    equal = (variance == 0.0) & (factor < 1.0)
    return tl.where(equal, eps, variance + root * root), tl.where(equal, 1.0, factor)


@triton.jit
def _layer_norm_statistics(x, residual, dropout, factor, twice, row0, num_rows, width, eps,
                           DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                           RMS: tl.constexpr, TWICE: tl.constexpr):  # fmt: skip
    """(mean, variance, largest number) of rows that are wider than a tile, times `factor`."""
    mean = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    if not RMS:
        for col0 in tl.range(0, width, COLS):
            h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
            mean += tl.sum(h * factor[:, None], 1)
        mean = mean / width
        if TWICE:
            rest = tl.zeros([ROWS], tl.float32)
            for col0 in tl.range(0, width, COLS):
                h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
                inside = (col0 + tl.arange(0, COLS))[None, :] < width
                rest += tl.sum(tl.where(inside, h * factor[:, None] - mean[:, None], 0.0), 1)
            mean += tl.where(twice, rest / width, 0.0)
    square = tl.zeros([ROWS], tl.float32)
    for col0 in tl.range(0, width, COLS):
        h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
        inside = (col0 + tl.arange(0, COLS))[None, :] < width
        centred = tl.where(inside, h * factor[:, None] - mean[:, None], 0.0)
        square += tl.sum(centred * centred, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(h), 1))
    return mean, square / width, largest


@triton.jit
def _write(y, h_out, weight, bias, h, mean, rstd, factor, row0, col0, num_rows, width,
           ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """One tile of y and, if it is wanted, of the sum; mean and rstd are those of h * factor."""
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = col0 + tl.arange(0, COLS)
    inside = (rows < num_rows) & (cols[None, :] < width)
    if h_out is not None:
        store(h_out, rows, cols[None, :], h, inside)
    result = (h * factor[:, None] - mean[:, None]) * rstd[:, None]
    if weight is not None:
        result = result * load_vector(weight, cols, width)[None, :]
    if bias is not None:
        result = result + load_vector(bias, cols, width)[None, :]
    store(y, rows, cols[None, :], result, inside)


@triton.jit(do_not_specialize=["threshold", "drop_scale", "num_rows", "width", "eps"])
def _layer_norm_forward_kernel(
    x, residual, weight, bias, rng, threshold, drop_scale, y, h_out, mean_out, rstd_out, num_rows,
    width, eps, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RMS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows; WHOLE: a tile holds all of a row."""
    dropout = Dropout(rng, threshold, drop_scale)
    row0 = tl.program_id(0) * ROWS
    factor = tl.full([ROWS], 1.0, tl.float32)
    power = factor
    if WHOLE:
        inside = tl.arange(0, COLS)[None, :] < width
        h = load_sum(x, residual, dropout, row0, 0, num_rows, width, DTYPE, ROWS, COLS)
        mean, variance = _statistics_of_tile(h, inside, width, None, RMS, False)
        variance += eps
        extreme = _is_extreme(variance)
        if tl.max(extreme.to(tl.int32), 0) != 0:
            factor = _factor(tl.max(tl.abs(h), 1), eps)
            mean, variance = _statistics_of_tile(h * factor[:, None], inside, width, extreme,
                                                 RMS, True)  # fmt: skip
            variance, power = _add_eps(variance, factor, eps)
        rstd = 1.0 / tl.sqrt_rn(variance)
        _write(y, h_out, weight, bias, h, mean, rstd, factor, row0, 0, num_rows, width, ROWS, COLS)
    else:
        mean, variance, largest = _layer_norm_statistics(
            x, residual, dropout, factor, None, row0, num_rows, width, eps, DTYPE, ROWS, COLS, RMS,
            False,
        )  # fmt: skip
        variance += eps
        extreme = _is_extreme(variance)
        if tl.max(extreme.to(tl.int32), 0) != 0:
            factor = _factor(largest, eps)
            mean, variance, _largest = _layer_norm_statistics(
                x, residual, dropout, factor, extreme, row0, num_rows, width, eps, DTYPE, ROWS,
                COLS, RMS, True,
            )  # fmt: skip
            variance, power = _add_eps(variance, factor, eps)
        rstd = 1.0 / tl.sqrt_rn(variance)
        for col0 in tl.range(0, width, COLS):
            h = load_sum(x, residual, dropout, row0, col0, num_rows, width, DTYPE, ROWS, COLS)
            _write(y, h_out, weight, bias, h, mean, rstd, factor, row0, col0, num_rows, width, ROWS,
                   COLS)  # fmt: skip
    row = row0 + tl.arange(0, ROWS)
    if mean_out is not None:
        tl.store(mean_out + row, mean / factor, mask=row < num_rows)
    if rstd_out is not None:
        tl.store(rstd_out + row, rstd * power, mask=row < num_rows)
