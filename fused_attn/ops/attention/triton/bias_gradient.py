"""Gradient of the bias: one program owns one tile of the bias and adds up whatever was broadcast.

Where a dimension of the bias is 1 the program goes through all of it, in a fixed order; `splits`
programs share a long walk and leave partial sums. Nothing of size (B, H, Lq, Lk) is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import load_delta, score_gradient
from .primitives import SCALARS, ScoreParams, Sizes, load_rows, locate
from .statistics import is_noisy
from .visibility import is_visited, keys_of_query, present_keys


@triton.jit
def gradient_of_tile(q, k, v, dout, statistics, dweights, m0, n0, sequence, head, terms, sizes,
                      params, CONFIG: tl.constexpr):  # fmt: skip
    """Gradient of one tile of scores before the softcap's slope, of which a bias knows nothing.

    Where there are functions of pairs their slope is that by what is wanted.
    """
    first, end, _holes = present_keys(terms, sequence.batch, sequence.len_k)
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    index, head_kv = sequence.index, head // sizes.group
    first_q, last_q = sequence.start_q + m0, sequence.start_q + sequence.len_q - 1
    first_k, last_k = sequence.start_k + n0, sequence.start_k + sequence.len_k - 1
    query = load_rows(q, None, index, head, first_q, last_q, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                      CONFIG.BLOCK_D)  # fmt: skip
    key = load_rows(k, None, index, head_kv, first_k, last_k, CONFIG.BLOCK_N, CONFIG.HEAD_DIM,
                    CONFIG.BLOCK_D)  # fmt: skip
    doutput = load_rows(dout, None, index, head, first_q, last_q, CONFIG.BLOCK_M,
                        CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    value = load_rows(v, None, index, head_kv, first_k, last_k, CONFIG.BLOCK_N,
                      CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    bounds = keys_of_query(row[:, None], sequence, first, end, params, CONFIG)
    delta = load_delta(statistics, row[:, None], sequence, head, sizes)
    noisy = is_noisy(statistics, m0, sequence, head, sizes, CONFIG)
    ds, _p = score_gradient(
        query, key, doutput, value, (q, head, first_q, last_q), (k, head_kv, first_k, last_k),
        (dout, head, first_q, last_q), (v, head_kv, first_k, last_k), m0, n0, bounds, statistics,
        delta, dweights, sequence, head, terms, sizes, params, noisy, True, False, CONFIG.PAIRS,
        CONFIG,
    )  # fmt: skip
    return ds


@triton.jit(
    do_not_specialize=[
        *("bias_batch", "bias_heads", "bias_rows", "bias_cols"),
        *("walk_b", "walk_h", "walk_m", "walk_n", "splits"),
        *SCALARS,
    ]
)
def _attention_bias_gradient_kernel(
    q, k, v, dout, statistics, dweights, partial, bias_batch, bias_heads, bias_rows, bias_cols,
    walk_b, walk_h, walk_m, walk_n, splits, terms, num_heads, group, seqlen_q, seqlen_k, scale,
    softcap, left, right, lower_right, threshold, keep_scale, chunk, CONFIG: tl.constexpr,
):  # fmt: skip
    """Sum of the score gradients over a share of the dimensions that the bias is broadcast over.

    `walk_*` are batch elements, heads, tiles of queries and of keys that one tile of the bias
    stands for.
    """
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    tiles_m = tl.cdiv(bias_rows, CONFIG.BLOCK_M)
    tiles_n = tl.cdiv(bias_cols, CONFIG.BLOCK_N)
    program = tl.program_id(0)
    tile_n, program = program % tiles_n, program // tiles_n
    tile_m, program = program % tiles_m, program // tiles_m
    bias_h, program = program % bias_heads, program // bias_heads
    bias_b, split = program % bias_batch, program // bias_batch
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_N], tl.float32)
    steps = walk_b * walk_h * walk_m * walk_n
    share = tl.cdiv(steps, splits)
    for step in tl.range(split * share, tl.minimum((split + 1) * share, steps)):
        n, rest = step % walk_n, step // walk_n
        m, rest = rest % walk_m, rest // walk_m
        h, b = rest % walk_h, rest // walk_h
        sequence, head = locate(terms, sizes, params, bias_b + b, CONFIG), bias_h + h
        m0, n0 = (tile_m + m) * CONFIG.BLOCK_M, (tile_n + n) * CONFIG.BLOCK_N
        inside = (m0 < sequence.len_q) & (n0 < sequence.len_k)  # of a shorter packed sequence
        if inside & is_visited(m0, n0, head, sequence, terms, params, CONFIG):
            acc += gradient_of_tile(q, k, v, dout, statistics, dweights, m0, n0, sequence, head,
                                     terms, sizes, params, CONFIG)  # fmt: skip
    row = tile_m * CONFIG.BLOCK_M + tl.arange(0, CONFIG.BLOCK_M)[:, None]
    col = tile_n * CONFIG.BLOCK_N + tl.arange(0, CONFIG.BLOCK_N)[None, :]
    if CONFIG.SUM_ROWS:
        acc = tl.sum(acc, 0, keep_dims=True)
        row = tl.zeros([1, 1], tl.int32)
    if CONFIG.SUM_COLS:
        acc = tl.sum(acc, 1, keep_dims=True)
        col = tl.zeros([1, 1], tl.int32)
    plane = (split * bias_batch + bias_b).to(tl.int64) * bias_heads + bias_h
    target = partial + (plane * bias_rows + row) * bias_cols + col
    tl.store(target, acc, mask=(row < bias_rows) & (col < bias_cols))
