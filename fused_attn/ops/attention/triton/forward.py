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
    SCALARS,
    ScoreParams,
    Sizes,
    first_row,
    load_rows,
    locate,
    store_rows,
)
from .scores import COARSE, keep_mask, only_seen, scores, softmax_update
from .visibility import keys_of_query, tile_at, visible_keys, walk


@triton.jit
def attend(
    acc, peak, total, extreme, query, from_q, k, v, k_desc, v_desc, m0, sequence, head, keys, path,
    terms, sizes, params, MASKED: tl.constexpr, EXACT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Stream the tiles of keys along a `walk` through the softmax of one tile of queries.

    `extreme` is the largest |peak| so far of each row, where that is not EXACT.
    """
    low, high, first, end = keys
    visited, a, b, c, d = path
    HIDING: tl.constexpr = MASKED or CONFIG.FULL_HIDES
    index, head_kv = sequence.index, head // sizes.group
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    bounds = keys_of_query(row[:, None], sequence, first, end, params, CONFIG)
    last = sequence.start_k + sequence.len_k - 1
    for i in tl.range(a, b + d - c):
        n0 = tile_at(i, b, c, visited, terms) * CONFIG.BLOCK_N
        first_key = sequence.start_k + n0
        col = n0 + tl.arange(0, CONFIG.BLOCK_N)
        key = load_rows(k, k_desc, index, head_kv, first_key, last, CONFIG.BLOCK_N,
                        CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        s, scale, _slope, _qk = scores(
            query, key, from_q, (k, head_kv, first_key, last), m0, n0, row[:, None], col[None, :],
            bounds, sequence, head, terms, sizes, params, None, MASKED, False, False, CONFIG,
        )  # fmt: skip
        p, shrink, peak, total = softmax_update(s, scale, peak, total, HIDING, EXACT)
        if not EXACT:
            extreme = tl.maximum(extreme, tl.where(peak == -INFINITY, 0.0, tl.abs(peak)))
        kept = p
        if terms.rng is not None:
            keep = keep_mask(row, n0, sequence, head, terms, sizes, params, CONFIG.BLOCK_M,
                             CONFIG.BLOCK_N)  # fmt: skip
            kept = tl.where(keep != 0, p, 0.0)
        value = load_rows(v, v_desc, index, head_kv, first_key, last, CONFIG.BLOCK_N,
                          CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, not MASKED)  # fmt: skip
        if HIDING:
            value = only_seen(value, p, col, low, high, terms, CONFIG)
        acc = tl.dot(kept.to(value.dtype), value, acc * shrink[:, None],
                     input_precision=CONFIG.PRECISION)  # fmt: skip
    return acc, peak, total, extreme


@triton.jit
def _finish(acc, peak, total, out, lse, m0, end, sequence, head, sizes, params, EXACT: tl.constexpr,
            CONFIG: tl.constexpr):  # fmt: skip
    """Write the output and lse of the queries [m0, min(m0 + BLOCK_M, end))."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (params.keep_scale / total)[:, None]
    store_rows(out, sequence.index, head, sequence.start_q + m0, sequence.start_q + end, acc,
               CONFIG.BLOCK_M, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    if lse is not None:
        row = m0 + tl.arange(0, CONFIG.BLOCK_M)
        if not EXACT:
            logsumexp = (peak + tl.log2(total)) * LN2
        elif CONFIG.MODIFIED:
            logsumexp = peak + tl.log2(total) * LN2
        else:
            logsumexp = peak * params.scale + tl.log2(total) * LN2
        logsumexp = tl.where(empty, -INFINITY, logsumexp)
        tl.store(lse + first_row(sequence, head, sizes) + row, logsumexp, mask=row < end)


@triton.jit
def _attend_exactly(q, k, v, out, lse, m0, sequence, head, terms, sizes, params,
                    ROWS: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Output and lse of ROWS queries anew, with exact maxima, in tiles that take few registers."""
    last = sequence.start_q + sequence.len_q - 1
    for part in tl.range(0, tl.cdiv(tl.minimum(ROWS, sequence.len_q - m0), CONFIG.BLOCK_M)):
        m = m0 + part * CONFIG.BLOCK_M
        keys, tiles = visible_keys(m, sequence, terms, params, CONFIG)
        first_query = sequence.start_q + m
        query = load_rows(q, None, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                          CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
        acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_DV], tl.float32)
        peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
        total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
        acc, peak, total, _extreme = attend(
            acc, peak, total, total, query, (q, head, first_query, last), k, v, None, None, m,
            sequence, head, keys, (m, tiles[0], tiles[3], 0, 0), terms, sizes, params, True,
            True, CONFIG,
        )  # fmt: skip
        _finish(acc, peak, total, out, lse, m, sequence.len_q, sequence, head, sizes, params, True,
                CONFIG)  # fmt: skip


@triton.jit(do_not_specialize=[*SCALARS, "num_tiles"])
def _attention_forward_kernel(
    q, k, v, out, lse, q_desc, k_desc, v_desc, terms, num_heads, group, seqlen_q, seqlen_k,
    scale, softcap, left, right, lower_right, threshold, keep_scale, chunk, num_tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    program = tl.program_id(0)
    if CONFIG.BAND:  # the last tiles are the longest: they start first, of all heads
        planes = tl.num_programs(0) // num_tiles
        tile, plane = num_tiles - 1 - program // planes, program % planes
    else:
        tile, plane = program % num_tiles, program // num_tiles
    sequence = locate(terms, sizes, params, plane // num_heads, CONFIG)
    head = plane % num_heads
    m0 = tile * CONFIG.BLOCK_M
    if m0 >= sequence.len_q:
        return
    keys, tiles = visible_keys(m0, sequence, terms, params, CONFIG)
    tile_n, full, past_full, past = tiles
    first_query, last = sequence.start_q + m0, sequence.start_q + sequence.len_q - 1
    query = load_rows(q, q_desc, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                      CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    from_q = (q, head, first_query, last)
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_DV], tl.float32)
    peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    extreme = total
    # Where the scale comes last an exact maximum costs a subtraction a score.
    path = walk(terms, sequence, head, tile, (full, past_full, 0, 0), False)
    acc, peak, total, extreme = attend(
        acc, peak, total, extreme, query, from_q, k, v, k_desc, v_desc, m0, sequence, head, keys,
        path, terms, sizes, params, False, CONFIG.MODIFIED, CONFIG,
    )  # fmt: skip
    path = walk(terms, sequence, head, tile, (tile_n, full, past_full, past))
    acc, peak, total, extreme = attend(
        acc, peak, total, extreme, query, from_q, k, v, k_desc, v_desc, m0, sequence, head, keys,
        path, terms, sizes, params, True, CONFIG.MODIFIED, CONFIG,
    )  # fmt: skip
    end = sequence.len_q
    # It is paid where a score of this tile asks for it.
    if not CONFIG.MODIFIED:  # noqa: SIM102, one is known at compile time
        if tl.max(extreme, 0) > COARSE:
            _attend_exactly(q, k, v, out, lse, m0, sequence, head, terms, sizes, params,
                            CONFIG.BLOCK_M, CONFIG.SMALL)  # fmt: skip
            end = end * 0
    _finish(acc, peak, total, out, lse, m0, end, sequence, head, sizes, params, CONFIG.MODIFIED,
            CONFIG)  # fmt: skip
