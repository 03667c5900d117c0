"""Backward: the gradients of keys and values, then that of queries.

Dao 2023, "FlashAttention-2", algorithm 2, split in two kernels so that each sum has one owner: no
atomic additions, so results repeat bit for bit. Scores are recomputed from q, k and the row
statistics (`statistics.py`). Where those say that scores are too large for that, or where a sum
turns out not to be finite, a program does its share anew, with products that are added up in the
order of the statistics, in place of storing what it has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    SCALARS,
    ScoreParams,
    Sizes,
    Terms,
    first_row,
    load_rows,
    locate,
    products,
    products_in_order,
    store_rows,
)
from .scores import keep_mask, load_scores, only_seen, probabilities
from .statistics import is_noisy, is_noisy_in_group
from .visibility import keys_of_query, tile_at, visible_keys, visible_queries, walk


@triton.jit
def load_delta(statistics, row, sequence, head, sizes):
    """Delta of some rows."""
    at = first_row(sequence, head, sizes) + tl.minimum(row, sequence.len_q - 1)
    return tl.load(statistics.delta + at)


@triton.jit
def load_dweights(dweights, m0, n0, row, col, sequence, head, INSIDE: tl.constexpr,
                  CONFIG: tl.constexpr):  # fmt: skip
    """A tile of the gradient of the weights; 0 if there is none. As `load_terms`."""
    loaded = 0.0
    if dweights is not None:
        loaded = load_scores(dweights, m0, n0, row, col, sequence, head, INSIDE, CONFIG)
        loaded = loaded.to(tl.float32)
    return loaded


@triton.jit
def softmax_gradient(p, dp, dweights, delta, keep, terms, params):
    """Gradient of the score: p (dp - delta), where dp is that of the undropped probabilities.

    `dp` comes in as dout v^T, `dweights` as what is to be added to it.
    """
    dp = dp + dweights
    if terms.rng is not None:
        dp = tl.where(keep != 0, dp * params.keep_scale, 0.0)
    return p * (dp - delta)


@triton.jit
def _is_wrong(total):
    """Whether a sum of gradients shows that a probability was not finite.

    It was not, or an operand was not, if an element of the sum is not: a score, as this kernel
    computes it, may exceed by far the one that lse comes from, where large products cancel.
    """
    # All at once: for sm_100 Triton 3.7.1 fails to compile the sum of an accumulator along an axis.
    return tl.sum(total * 0.0) != 0.0  # NaN where anything is not finite


@triton.jit
def _accumulate_queries(
    dk, dv, key, value, from_k, from_v, q, dout, statistics, dweights, n0, sequence, head, bounds,
    path, terms, sizes, params, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Add what the queries along a `walk` of one head give to a tile of keys."""
    visited, a, b, c, d = path
    HIDING: tl.constexpr = MASKED or CONFIG.FULL_HIDES
    index = sequence.index
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[:, None]
    last = sequence.start_q + sequence.len_q - 1
    for i in tl.range(a, b + d - c):
        m0 = tile_at(i, b, c, visited, terms) * CONFIG.BLOCK_M
        first_query = sequence.start_q + m0
        row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[None, :]
        query = load_rows(q, None, index, head, first_query, last, CONFIG.BLOCK_M,
                          CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        dw = load_dweights(dweights, m0, n0, row, col, sequence, head, not MASKED, CONFIG)
        p, slope = probabilities(
            key, query, from_k, (q, head, first_query, last), m0, n0, row, col, bounds, statistics,
            sequence, head, terms, sizes, params, None, MASKED, IN_ORDER, True, CONFIG,
        )  # fmt: skip
        delta = load_delta(statistics, row, sequence, head, sizes)
        keep = 0
        kept = p
        if terms.rng is not None:
            position = m0 + tl.arange(0, CONFIG.BLOCK_M)
            keep = tl.trans(keep_mask(position, n0, sequence, head, terms, sizes, params,
                                      CONFIG.BLOCK_M, CONFIG.BLOCK_N))  # fmt: skip
            kept = tl.where(keep != 0, p * params.keep_scale, 0.0)
        doutput = load_rows(dout, None, index, head, first_query, last, CONFIG.BLOCK_M,
                            CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, not MASKED)  # fmt: skip
        dv = tl.dot(kept.to(doutput.dtype), doutput, dv, input_precision=CONFIG.PRECISION)
        from_dout = (dout, head, first_query, last)
        if IN_ORDER:
            dp = products_in_order(from_v, from_dout, index, CONFIG.BLOCK_N, CONFIG.BLOCK_M,
                                   CONFIG.HEAD_DIM_V)  # fmt: skip
        else:
            dp = products(value, doutput, from_v, from_dout, index, CONFIG.BLOCK_N, CONFIG.BLOCK_M,
                          CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, not MASKED, CONFIG)  # fmt: skip
        ds = softmax_gradient(p, dp, dw, delta, keep, terms, params) * slope
        if HIDING:
            ds = tl.where(p == 0.0, 0.0, ds)  # what is hidden may be NaN
        if CONFIG.BLOCK_D > CONFIG.CHUNK:  # loaded above it would fill registers all the while
            query = load_rows(q, None, index, head, first_query, last, CONFIG.BLOCK_M,
                              CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=CONFIG.PRECISION)
    return dk, dv


@triton.jit
def _store_keys(dk, dv, dkey, dvalue, n0, end, sequence, head, params, CONFIG: tl.constexpr):
    """Write the gradients of the keys [n0, min(n0 + BLOCK_N, end)) and their values."""
    first, end = sequence.start_k + n0, sequence.start_k + end
    if dk is not None:
        store_rows(dk, sequence.index, head, first, end, dkey * params.scale, CONFIG.BLOCK_N,
                   CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    if dv is not None:
        store_rows(dv, sequence.index, head, first, end, dvalue, CONFIG.BLOCK_N,
                   CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip


@triton.jit
def _keys_in_order(q, k, v, dout, statistics, dk, dv, dweights, n0, sequence, head_kv, terms, sizes,
                   params, KEYS: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Gradients of KEYS keys and values anew, in order, in tiles that take few registers."""
    unlisted = Terms(terms.bias, terms.mask, terms.padding, terms.key_ranges, terms.key_lengths,
                     terms.alibi_slopes, terms.cu_seqlens_q, terms.cu_seqlens_k, terms.rng,
                     terms.query_ids, terms.key_ids, terms.prefix_lengths, terms.pairs)  # fmt: skip
    last = sequence.start_k + sequence.len_k - 1
    for part in tl.range(0, tl.cdiv(tl.minimum(KEYS, sequence.len_k - n0), CONFIG.BLOCK_N)):
        n = n0 + part * CONFIG.BLOCK_N
        bounds, tiles = visible_queries(n, sequence, terms, sizes, params, True, CONFIG)
        first_key = sequence.start_k + n
        from_k, from_v = (k, head_kv, first_key, last), (v, head_kv, first_key, last)
        dkey = tl.zeros([CONFIG.BLOCK_N, CONFIG.BLOCK_D], tl.float32)
        dvalue = tl.zeros([CONFIG.BLOCK_N, CONFIG.BLOCK_DV], tl.float32)
        for member in range(sizes.group):
            dkey, dvalue = _accumulate_queries(
                dkey, dvalue, None, None, from_k, from_v, q, dout, statistics, dweights, n,
                sequence, head_kv * sizes.group + member, bounds, (n, tiles[0], tiles[3], 0, 0),
                unlisted, sizes, params, True, True, CONFIG,
            )  # fmt: skip
        _store_keys(dk, dv, dkey, dvalue, n, sequence.len_k, sequence, head_kv, params, CONFIG)


@triton.jit(do_not_specialize=[*SCALARS, "num_tiles"])
def _attention_backward_dkdv_kernel(
    q, k, v, dout, statistics, dk, dv, dweights, terms, num_heads, group, seqlen_q, seqlen_k,
    scale, softcap, left, right, lower_right, threshold, keep_scale, chunk, num_tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one key head, from all queries of its group."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    # Under a causal band the first keys are seen most: they start first, of all heads.
    program = tl.program_id(0)
    if CONFIG.BAND:
        planes = tl.num_programs(0) // num_tiles
        tile, plane = program // planes, program % planes
    else:
        tile, plane = program % num_tiles, program // num_tiles
    num_heads_kv = num_heads // group
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    sequence = locate(terms, sizes, params, batch, CONFIG)
    n0 = tile * CONFIG.BLOCK_N
    if n0 >= sequence.len_k:
        return
    BOUNDED: tl.constexpr = (
        (terms.bias is not None)
        or (terms.mask is not None)
        or (dweights is not None)
        or CONFIG.PAIRS
    )
    bounds, tiles = visible_queries(n0, sequence, terms, sizes, params, BOUNDED, CONFIG)
    a, b, c, d = tiles
    first_key, last = sequence.start_k + n0, sequence.start_k + sequence.len_k - 1
    key = load_rows(k, None, sequence.index, head_kv, first_key, last, CONFIG.BLOCK_N,
                    CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    value = load_rows(v, None, sequence.index, head_kv, first_key, last, CONFIG.BLOCK_N,
                      CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    from_k, from_v = (k, head_kv, first_key, last), (v, head_kv, first_key, last)
    dkey = tl.zeros([CONFIG.BLOCK_N, CONFIG.BLOCK_D], tl.float32)
    dvalue = tl.zeros([CONFIG.BLOCK_N, CONFIG.BLOCK_DV], tl.float32)
    for member in range(group):
        head = head_kv * group + member
        path = walk(terms, sequence, head, tile, (b, c, 0, 0), False)
        dkey, dvalue = _accumulate_queries(
            dkey, dvalue, key, value, from_k, from_v, q, dout, statistics, dweights, n0, sequence,
            head, bounds, path, terms, sizes, params, False, False, CONFIG,
        )  # fmt: skip
        path = walk(terms, sequence, head, tile, (a, b, c, d))
        dkey, dvalue = _accumulate_queries(
            dkey, dvalue, key, value, from_k, from_v, q, dout, statistics, dweights, n0, sequence,
            head, bounds, path, terms, sizes, params, True, False, CONFIG,
        )  # fmt: skip
    again = _is_wrong(dkey) | is_noisy_in_group(statistics, sequence, head_kv, sizes)
    # Stored first: their registers are free for what may follow.
    end = tl.where(again, 0, sequence.len_k)
    _store_keys(dk, dv, dkey, dvalue, n0, end, sequence, head_kv, params, CONFIG)
    if again:
        _keys_in_order(q, k, v, dout, statistics, dk, dv, dweights, n0, sequence, head_kv, terms,
                       sizes, params, CONFIG.BLOCK_N, CONFIG.SMALL)  # fmt: skip


@triton.jit
def score_gradient(
    query, key, doutput, value, from_q, from_k, from_dout, from_v, m0, n0, bounds, statistics,
    delta, dweights, sequence, head, terms, sizes, params, noisy, MASKED: tl.constexpr,
    IN_ORDER: tl.constexpr, SLOPED: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """(gradient of a tile of scores, probabilities); both 0 where they are hidden or outside.

    SLOPED: of q k^T, through the softcap. `noisy` and IN_ORDER as for `scores`.
    """
    row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[:, None]
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[None, :]
    HIDING: tl.constexpr = MASKED or CONFIG.FULL_HIDES
    dw = load_dweights(dweights, m0, n0, row, col, sequence, head, not MASKED, CONFIG)
    p, slope = probabilities(
        query, key, from_q, from_k, m0, n0, row, col, bounds, statistics, sequence, head, terms,
        sizes, params, noisy, MASKED, IN_ORDER, False, CONFIG,
    )  # fmt: skip
    if IN_ORDER:
        dp = products_in_order(from_dout, from_v, sequence.index, CONFIG.BLOCK_M, CONFIG.BLOCK_N,
                               CONFIG.HEAD_DIM_V)  # fmt: skip
    else:
        dp = products(doutput, value, from_dout, from_v, sequence.index, CONFIG.BLOCK_M,
                      CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, not MASKED,
                      CONFIG)  # fmt: skip
        if noisy is not None:  # noqa: SIM102, one is known at compile time
            if noisy != 0:
                dp = products_in_order(from_dout, from_v, sequence.index, CONFIG.BLOCK_M,
                                       CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V)  # fmt: skip
    keep = 0
    if terms.rng is not None:
        position = m0 + tl.arange(0, CONFIG.BLOCK_M)
        keep = keep_mask(position, n0, sequence, head, terms, sizes, params, CONFIG.BLOCK_M,
                         CONFIG.BLOCK_N)  # fmt: skip
    ds = softmax_gradient(p, dp, dw, delta, keep, terms, params)
    if SLOPED:
        ds = ds * slope
    if HIDING:
        ds = tl.where(p == 0.0, 0.0, ds)  # what is hidden may be NaN
    return ds, p


@triton.jit
def _accumulate_keys(
    dq, query, doutput, from_q, from_dout, statistics, delta, k, v, dweights, m0, sequence, head,
    keys, path, terms, sizes, params, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Add what the keys along a `walk` give to a tile of queries."""
    low, high, first, end = keys
    visited, a, b, c, d = path
    HIDING: tl.constexpr = MASKED or CONFIG.FULL_HIDES
    index, head_kv = sequence.index, head // sizes.group
    row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[:, None]
    bounds = keys_of_query(row, sequence, first, end, params, CONFIG)
    last = sequence.start_k + sequence.len_k - 1
    for i in tl.range(a, b + d - c):
        n0 = tile_at(i, b, c, visited, terms) * CONFIG.BLOCK_N
        first_key = sequence.start_k + n0
        key = load_rows(k, None, index, head_kv, first_key, last, CONFIG.BLOCK_N,
                        CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        value = load_rows(v, None, index, head_kv, first_key, last, CONFIG.BLOCK_N,
                          CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, not MASKED)  # fmt: skip
        from_k, from_v = (k, head_kv, first_key, last), (v, head_kv, first_key, last)
        ds, p = score_gradient(
            query, key, doutput, value, from_q, from_k, from_dout, from_v, m0, n0, bounds,
            statistics, delta[:, None], dweights, sequence, head, terms, sizes, params, None,
            MASKED, IN_ORDER, True, CONFIG,
        )  # fmt: skip
        if CONFIG.BLOCK_D > CONFIG.CHUNK:
            key = load_rows(k, None, index, head_kv, first_key, last, CONFIG.BLOCK_N,
                            CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        if HIDING:
            key = only_seen(key, p, n0 + tl.arange(0, CONFIG.BLOCK_N), low, high, terms, CONFIG)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=CONFIG.PRECISION)
    return dq


@triton.jit
def _queries_in_order(q, k, v, dout, statistics, dq, dweights, m0, sequence, head, terms, sizes,
                      params, ROWS: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Gradients of ROWS queries anew, in order, in tiles that take few registers."""
    unlisted = Terms(terms.bias, terms.mask, terms.padding, terms.key_ranges, terms.key_lengths,
                     terms.alibi_slopes, terms.cu_seqlens_q, terms.cu_seqlens_k, terms.rng,
                     terms.query_ids, terms.key_ids, terms.prefix_lengths, terms.pairs)  # fmt: skip
    last = sequence.start_q + sequence.len_q - 1
    for part in tl.range(0, tl.cdiv(tl.minimum(ROWS, sequence.len_q - m0), CONFIG.BLOCK_M)):
        m = m0 + part * CONFIG.BLOCK_M
        keys, tiles = visible_keys(m, sequence, terms, params, CONFIG)
        first_query = sequence.start_q + m
        from_q, from_dout = (q, head, first_query, last), (dout, head, first_query, last)
        row = m + tl.arange(0, CONFIG.BLOCK_M)
        dquery = _accumulate_keys(
            tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_D], tl.float32), None, None, from_q, from_dout,
            statistics, load_delta(statistics, row, sequence, head, sizes), k, v, dweights, m,
            sequence, head, keys, (m, tiles[0], tiles[3], 0, 0), unlisted, sizes, params, True,
            True, CONFIG,
        )  # fmt: skip
        store_rows(dq, sequence.index, head, first_query, last + 1, dquery * params.scale,
                   CONFIG.BLOCK_M, CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=[*SCALARS, "num_tiles"])
def _attention_backward_dq_kernel(
    q, k, v, dout, statistics, dq, dweights, terms, num_heads, group, seqlen_q, seqlen_k, scale,
    softcap, left, right, lower_right, threshold, keep_scale, chunk, num_tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head."""
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
    a, b, c, d = tiles
    first_query, last = sequence.start_q + m0, sequence.start_q + sequence.len_q - 1
    query = load_rows(q, None, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                      CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    doutput = load_rows(dout, None, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                        CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    from_q, from_dout = (q, head, first_query, last), (dout, head, first_query, last)
    delta = load_delta(statistics, m0 + tl.arange(0, CONFIG.BLOCK_M), sequence, head, sizes)
    dquery = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_D], tl.float32)
    path = walk(terms, sequence, head, tile, (b, c, 0, 0), False)
    dquery = _accumulate_keys(
        dquery, query, doutput, from_q, from_dout, statistics, delta, k, v, dweights, m0, sequence,
        head, keys, path, terms, sizes, params, False, False, CONFIG,
    )  # fmt: skip
    path = walk(terms, sequence, head, tile, (a, b, c, d))
    dquery = _accumulate_keys(
        dquery, query, doutput, from_q, from_dout, statistics, delta, k, v, dweights, m0, sequence,
        head, keys, path, terms, sizes, params, True, False, CONFIG,
    )  # fmt: skip
    again = _is_wrong(dquery) | is_noisy(statistics, m0, sequence, head, sizes, CONFIG)
    end = tl.where(again, 0, last + 1)
    store_rows(dq, sequence.index, head, first_query, end, dquery * scale, CONFIG.BLOCK_M,
               CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    if again:
        _queries_in_order(q, k, v, dout, statistics, dq, dweights, m0, sequence, head, terms, sizes,
                          params, CONFIG.BLOCK_M, CONFIG.SMALL)  # fmt: skip
