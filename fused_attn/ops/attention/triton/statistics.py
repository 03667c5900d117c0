"""Sharper statistics of rows whose lse is too coarse to recompute probabilities from.

A bias that "hides" keys by the lowest number leaves rows in which all scores are huge and equal:
lse then cannot hold the logarithm of their count, and exp(score - lse) would not sum to 1. For such
rows the largest score and the sum of exponentials are taken anew, as two numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    INFINITY,
    LOG2E,
    hide_keys,
    keys_of_query,
    load_rows,
    load_terms,
    locate,
    present_keys,
    products,
    score,
    tile_at,
    visible_keys,
    walk,
)

# Beyond this |lse| its rounding error shows in the probabilities.
COARSE = tl.constexpr(1e4)


@triton.jit(do_not_specialize=["sizes", "scalars", "num_tiles"])
def _attention_refine_kernel(
    q, k, lse, peaks, weights, terms, sizes, scalars, num_tiles, CONFIG: tl.constexpr
):  # fmt: skip
    """What p = exp2(score - peak) * weight needs of BLOCK_M queries of one head."""
    tile, plane = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    batch, head = plane // sizes.num_heads, plane % sizes.num_heads
    _start_q, len_q, _start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    m0 = tile * CONFIG.BLOCK_M
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    at = plane.to(tl.int64) * sizes.seqlen_q + row
    inside = row < len_q
    known = tl.load(lse + at, mask=inside, other=0.0)
    coarse = (tl.abs(known) > COARSE) & (tl.abs(known) != INFINITY)
    peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    if tl.max(coarse.to(tl.int32), 0) != 0:
        first, end, holes = present_keys(terms, batch, len_k)
        end_m = tl.minimum(m0 + CONFIG.BLOCK_M, len_q)
        _low, _high, tile_n, _full, _past_full, past = visible_keys(
            m0, end_m, shift, first, end, holes, scalars, CONFIG
        )
        query = load_rows(q, None, index, head, m0, len_q - 1, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                          CONFIG.BLOCK_D)  # fmt: skip
        visited, a, b, _c, _d = walk(terms, batch, head, tile, (tile_n, past, 0, 0))
        for i in tl.range(a, b):
            n0 = tile_at(i, b, b, visited, terms) * CONFIG.BLOCK_N
            rows, cols = row[:, None], (n0 + tl.arange(0, CONFIG.BLOCK_N))[None, :]
            key = load_rows(k, None, index, head // sizes.group, n0, len_k - 1, CONFIG.BLOCK_N,
                            CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
            loaded = load_terms((m0, n0), rows, cols, len_q, len_k, index, head, terms, False)
            qk = products(query, key, (q, head, m0, len_q - 1),
                          (k, head // sizes.group, n0, len_k - 1), index, CONFIG.BLOCK_M,
                          CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, False,
                          CONFIG)  # fmt: skip
            s, factor, _slope = score(
                qk, loaded, rows, cols, len_q, len_k, head, terms, scalars, CONFIG
            )
            low, high = keys_of_query(rows, len_q, shift, first, end, scalars, CONFIG)
            s = hide_keys(s, cols, low, high, len_k, index, terms)
            new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
            anchor = tl.where(new_peak == -INFINITY, 0.0, new_peak)
            p = tl.exp2(s * factor - anchor[:, None])
            total = total * tl.exp2(peak - anchor) + tl.sum(p, 1)
            peak = new_peak
    tl.store(peaks + at, tl.where(coarse, peak, known * LOG2E), mask=inside)
    tl.store(weights + at, tl.where(coarse, 1.0 / tl.where(coarse, total, 1.0), 1.0), mask=inside)
