"""Gradient of the bias: one program owns one tile of the bias and adds up whatever was broadcast.

Where a dimension of the bias is 1 the program goes through all of it, in a fixed order; `splits`
programs share a long walk and leave partial sums. Nothing of size (B, H, Lq, Lk) is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import load_delta, load_dweights, softmax_gradient
from .primitives import (
    hide_keys,
    is_visited,
    keep_mask,
    keys_of_query,
    load_rows,
    load_terms,
    locate,
    present_keys,
    probability,
    products,
    score,
)


@triton.jit
def _score_gradient(q, k, v, dout, rows, dweights, batch, head, m0, n0, terms, sizes,
                    scalars, CONFIG: tl.constexpr):  # fmt: skip
    """Gradient of one tile of scores, 0 where they are hidden or outside."""
    start_q, len_q, _start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    first, end, _holes = present_keys(terms, batch, len_k)
    row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[:, None]
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[None, :]
    head_kv = head // sizes.group
    query = load_rows(q, None, index, head, m0, len_q - 1, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                      CONFIG.BLOCK_D)  # fmt: skip
    key = load_rows(k, None, index, head_kv, n0, len_k - 1, CONFIG.BLOCK_N, CONFIG.HEAD_DIM,
                    CONFIG.BLOCK_D)  # fmt: skip
    loaded = load_terms((m0, n0), row, col, len_q, len_k, index, head, terms, False)
    dw = load_dweights(dweights, (m0, n0), row, col, len_q, len_k, index, head, False)
    qk = products(query, key, (q, head, m0, len_q - 1), (k, head_kv, n0, len_k - 1), index,
                  CONFIG.BLOCK_M, CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, False,
                  CONFIG)  # fmt: skip
    doutput = load_rows(dout, None, index, head, m0, len_q - 1, CONFIG.BLOCK_M, CONFIG.HEAD_DIM_V,
                        CONFIG.BLOCK_DV)  # fmt: skip
    value = load_rows(v, None, index, head_kv, n0, len_k - 1, CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V,
                      CONFIG.BLOCK_DV)  # fmt: skip
    dp = products(doutput, value, (dout, head, m0, len_q - 1), (v, head_kv, n0, len_k - 1), index,
                  CONFIG.BLOCK_M, CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, False,
                  CONFIG)  # fmt: skip
    s, factor, _slope = score(qk, loaded, row, col, len_q, len_k, head, terms, scalars, CONFIG)
    low, high = keys_of_query(row, len_q, shift, first, end, scalars, CONFIG)
    s = hide_keys(s, col, low, high, len_k, index, terms)
    p = probability(s, factor, rows, index, head, start_q, row, len_q, sizes)
    delta = load_delta(rows, index, head, start_q, row, len_q, sizes)
    keep = 0
    if terms.rng is not None:
        position = m0 + tl.arange(0, CONFIG.BLOCK_M)
        keep = keep_mask(terms, scalars, position, n0, batch * sizes.num_heads + head,
                         CONFIG.BLOCK_M, CONFIG.BLOCK_N)  # fmt: skip
    ds = softmax_gradient(p, dp, dw, delta, keep, terms, scalars)
    return tl.where(p == 0.0, 0.0, ds)  # what is hidden may be NaN


@triton.jit(do_not_specialize=["counts", "bias_sizes", "sizes", "scalars"])
def _attention_bias_gradient_kernel(
    q, k, v, dout, rows, dweights, partial, bias_sizes, counts, terms, sizes, scalars,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Sum of the score gradients over a share of the dimensions that the bias is broadcast over.

    `counts` are batch elements, heads, tiles of queries and of keys that one tile of the bias
    stands for, then the splits.
    """
    bias_batch, bias_heads, bias_rows, bias_cols = bias_sizes
    walk_b, walk_h, walk_m, walk_n, splits = counts
    tiles_m = tl.cdiv(bias_rows, CONFIG.BLOCK_M)
    tiles_n = tl.cdiv(bias_cols, CONFIG.BLOCK_N)
    program = tl.program_id(0)
    tile_n, program = program % tiles_n, program // tiles_n
    tile_m, program = program % tiles_m, program // tiles_m
    bias_h, program = program % bias_heads, program // bias_heads
    bias_b, split = program % bias_batch, program // bias_batch
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_N], tl.float32)
    walk = walk_b * walk_h * walk_m * walk_n
    share = tl.cdiv(walk, splits)
    for step in tl.range(split * share, tl.minimum((split + 1) * share, walk)):
        n, rest = step % walk_n, step // walk_n
        m, rest = rest % walk_m, rest // walk_m
        h, b = rest % walk_h, rest // walk_h
        batch, head = bias_b + b, bias_h + h
        m0, n0 = (tile_m + m) * CONFIG.BLOCK_M, (tile_n + n) * CONFIG.BLOCK_N
        if is_visited(m0, n0, batch, head, terms, sizes, scalars, CONFIG):
            acc += _score_gradient(q, k, v, dout, rows, dweights, batch, head, m0, n0, terms, sizes,
                                   scalars, CONFIG)  # fmt: skip
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
