"""y = dropout(act(x + bias)), gated or not, and its gradients, tile by tile.

The backward reads x and bias and computes the rest again. A program owns some columns and every
`splits`-th tile of rows, so the sums for the bias have one owner each: no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.triton.rows import Dropout, drop, load, load_vector, store


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(act(x), its derivative). GELU: Hendrycks, Gimpel 2016; SiLU: Elfwing, Uchibe, Doya 2017."""
    if ACTIVATION == "relu":
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:  # x sigmoid(z), where (1 + tanh(z / 2)) / 2 = sigmoid(z)
        z = x
        steepness = 1.0
        if ACTIVATION == "gelu_tanh":
            # From 1e6 on the sigmoid is 0 or 1, and its slope 0: not 0 times infinity.
            near = tl.where(tl.abs(x) < 1e6, x, tl.where(x < 0.0, -1e6, 1e6))
            near = tl.where(x != x, x, near)
            z = 1.5957691216057308 * (near + 0.044715 * near * near * near)
            steepness = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        rest = 1.0 / (1.0 + tl.exp(z))  # 1 - sigmoid, without its cancellation
        value = x * sigmoid
        slope = sigmoid + x * sigmoid * rest * steepness
    return value, slope


@triton.jit
def _load_biased(x, bias, rows, cols, inside, limit):
    """x + bias of a tile, float32."""
    h = load(x, rows, cols, inside)
    if bias is not None:
        h += load_vector(bias, cols, limit)
    return h


@triton.jit(do_not_specialize=["threshold", "drop_scale", "num_rows", "width"])
def _bias_activation_forward_kernel(
    x, bias, rng, threshold, drop_scale, y, num_rows, width, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    dropout = Dropout(rng, threshold, drop_scale)
    tiles = tl.cdiv(width, COLS)
    row0, col0 = (tl.program_id(0) // tiles) * ROWS, (tl.program_id(0) % tiles) * COLS
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = (col0 + tl.arange(0, COLS))[None, :]
    inside = (rows < num_rows) & (cols < width)
    value, _slope = activate(_load_biased(x, bias, rows, cols, inside, width), ACTIVATION)
    if GATED:
        value = value * _load_biased(x, bias, rows, cols + width, inside, 2 * width)
    if dropout.rng is not None:
        value = drop(value, row0, col0, dropout, ROWS, COLS)
    store(y, rows, cols, value, inside)


@triton.jit(do_not_specialize=["threshold", "drop_scale", "num_rows", "width", "splits"])
def _bias_activation_backward_kernel(
    x, bias, rng, threshold, drop_scale, dy, dx, dbiases, num_rows, width, splits,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx of every `splits`-th tile of rows of some columns, and their sum for the bias."""
    dropout = Dropout(rng, threshold, drop_scale)
    split, col0 = tl.program_id(0) % splits, (tl.program_id(0) // splits) * COLS
    cols = (col0 + tl.arange(0, COLS))[None, :]
    first = tl.zeros([COLS], tl.float32)
    second = tl.zeros([COLS], tl.float32)
    for tile in tl.range(split, tl.cdiv(num_rows, ROWS), splits):
        row0 = tile * ROWS
        rows = (row0 + tl.arange(0, ROWS))[:, None]
        inside = (rows < num_rows) & (cols < width)
        gradient = load(dy, rows, cols, inside)
        if dropout.rng is not None:
            gradient = drop(gradient, row0, col0, dropout, ROWS, COLS)
        value, slope = activate(_load_biased(x, bias, rows, cols, inside, width), ACTIVATION)
        of_gate = gradient * slope
        if GATED:
            up = _load_biased(x, bias, rows, cols + width, inside, 2 * width)
            of_gate = of_gate * up
            of_up = gradient * value
            if dx is not None:
                store(dx, rows, cols + width, of_up, inside)
            second += tl.sum(tl.where(inside, of_up, 0.0), 0)
        if dx is not None:
            store(dx, rows, cols, of_gate, inside)
        first += tl.sum(tl.where(inside, of_gate, 0.0), 0)
    if dbiases is not None:
        cols = col0 + tl.arange(0, COLS)
        stride = 2 * width if GATED else width
        target = dbiases + split.to(tl.int64) * stride + cols
        tl.store(target, first, mask=cols < width)
        if GATED:
            tl.store(target + width, second, mask=cols < width)
