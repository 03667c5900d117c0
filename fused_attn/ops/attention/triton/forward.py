"""Forward: one program computes the output and lse of BLOCK_M queries of one head.

Dao 2023, "FlashAttention-2", algorithm 1: tiles of keys stream by, and the softmax is carried along
as its running maximum and sum. Tiles without a visible key are not visited; tiles that all queries
see run in a loop of their own, which has no mask code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    INFINITY,
    LN2,
    hide_keys,
    keep_mask,
    keys_of_query,
    load_rows,
    load_terms,
    locate,
    only_seen,
    present_keys,
    products,
    score,
    store_rows,
    tile_at,
    visible_keys,
    walk,
)


@triton.jit
def softmax_update(s, factor, peak, total, HIDING: tl.constexpr):
    """Online softmax: (probabilities under the new maximum, what shrinks the old, peak, total).

    HIDING: a row may have seen no key yet, and its maximum is -inf.
    """
    new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
    anchor = new_peak
    if HIDING:
        anchor = tl.where(new_peak == -INFINITY, 0.0, new_peak)
    p = tl.exp2(s * factor - anchor[:, None])
    shrink = tl.exp2(peak - anchor)
    return p, shrink, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit
def attend(
    acc, peak, total, query, from_q, k, v, k_desc, v_desc, m0, where, keys, tiles, terms, sizes,
    scalars, MASKED: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Stream tiles [a, b) and [c, d) of keys through the softmax of one tile of queries."""
    batch, head, index, len_q, start_k, len_k, shift = where
    low, high, first, end = keys
    visited, a, b, c, d = walk(terms, batch, head, m0 // CONFIG.BLOCK_M, tiles)
    HIDING: tl.constexpr = MASKED or (terms.mask is not None) or (terms.bias is not None)
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    row_low, row_high = keys_of_query(row[:, None], len_q, shift, first, end, scalars, CONFIG)
    last = start_k + len_k - 1
    for i in tl.range(a, b + d - c):
        n0 = tile_at(i, b, c, visited, terms) * CONFIG.BLOCK_N
        col = n0 + tl.arange(0, CONFIG.BLOCK_N)
        key = load_rows(k, k_desc, index, head // sizes.group, start_k + n0, last,
                        CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        loaded = load_terms((m0, n0), row[:, None], col[None, :], len_q, len_k, index, head, terms,
                            not MASKED)  # fmt: skip
        qk = products(query, key, from_q, (k, head // sizes.group, start_k + n0, last), index,
                      CONFIG.BLOCK_M, CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED,
                      CONFIG)  # fmt: skip
        s, factor, _slope = score(
            qk, loaded, row[:, None], col[None, :], len_q, len_k, head, terms, scalars, CONFIG
        )
        if MASKED:
            s = hide_keys(s, col[None, :], row_low, row_high, len_k, index, terms)
        p, shrink, peak, total = softmax_update(s, factor, peak, total, HIDING)
        kept = p
        if terms.rng is not None:
            keep = keep_mask(terms, scalars, row, n0, batch * sizes.num_heads + head,
                             CONFIG.BLOCK_M, CONFIG.BLOCK_N)  # fmt: skip
            kept = tl.where(keep != 0, p, 0.0)
        value = load_rows(v, v_desc, index, head // sizes.group, start_k + n0, last,
                          CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV,
                          not MASKED)  # fmt: skip
        if HIDING:
            value = only_seen(value, p, col, low, high, terms)
        acc = tl.dot(kept.to(value.dtype), value, acc * shrink[:, None],
                     input_precision=CONFIG.PRECISION)  # fmt: skip
    return acc, peak, total


@triton.jit(do_not_specialize=["sizes", "scalars", "num_tiles"])
def _attention_forward_kernel(
    q, k, v, out, lse, q_desc, k_desc, v_desc, terms, sizes, scalars, num_tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if CONFIG.BAND:  # the last tiles are the longest: they start first, of all heads
        planes = tl.num_programs(0) // num_tiles
        tile, plane = num_tiles - 1 - program // planes, program % planes
    else:
        tile, plane = program % num_tiles, program // num_tiles
    batch, head = plane // sizes.num_heads, plane % sizes.num_heads
    start_q, len_q, start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    m0 = tile * CONFIG.BLOCK_M
    if m0 >= len_q:
        return
    first, end, holes = present_keys(terms, batch, len_k)
    end_m = tl.minimum(m0 + CONFIG.BLOCK_M, len_q)
    low, high, tile_n, full, past_full, past = visible_keys(
        m0, end_m, shift, first, end, holes, scalars, CONFIG
    )
    last = start_q + len_q - 1
    query = load_rows(q, q_desc, index, head, start_q + m0, last, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                      CONFIG.BLOCK_D)  # fmt: skip
    from_q = (q, head, start_q + m0, last)
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_DV], tl.float32)
    peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    where = (batch, head, index, len_q, start_k, len_k, shift)
    keys = (low, high, first, end)
    acc, peak, total = attend(
        acc, peak, total, query, from_q, k, v, k_desc, v_desc, m0, where, keys,
        (full, past_full, 0, 0), terms, sizes, scalars, False, CONFIG,
    )  # fmt: skip
    acc, peak, total = attend(
        acc, peak, total, query, from_q, k, v, k_desc, v_desc, m0, where, keys,
        (tile_n, full, past_full, past), terms, sizes, scalars, True, CONFIG,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (scalars.keep_scale / total)[:, None]
    store_rows(out, index, head, start_q + m0, start_q + len_q, acc, CONFIG.BLOCK_M,
               CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    if lse is not None:
        row = m0 + tl.arange(0, CONFIG.BLOCK_M)
        logsumexp = tl.where(empty, -INFINITY, (peak + tl.log2(total)) * LN2)
        first_row = (index * sizes.num_heads + head) * sizes.seqlen_q + start_q
        tl.store(lse + first_row + row, logsumexp, mask=row < len_q)
