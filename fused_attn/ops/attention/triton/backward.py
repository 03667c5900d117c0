"""Backward: delta, then the gradients of keys and values, then that of queries.

Dao 2023, "FlashAttention-2", algorithm 2, split in two kernels so that each sum has one owner: no
atomic additions, so results repeat bit for bit. Scores are recomputed from q, k and lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    elements_of,
    head_of,
    hide,
    hide_keys,
    keep_mask,
    keys_of_query,
    load_rows,
    load_terms,
    locate,
    only_seen,
    present_keys,
    probability,
    products,
    queries_of_key,
    score,
    store_rows,
    tile_at,
    visible_keys,
    visible_queries,
    walk,
)


@triton.jit
def load_delta(rows, index, head, start_q, row, len_q, sizes):
    """Delta of some rows."""
    first = (index * sizes.num_heads + head) * sizes.seqlen_q + start_q
    return tl.load(rows.delta + first + tl.minimum(row, len_q - 1))


@triton.jit
def load_dweights(dweights, origin, row, col, len_q, len_k, index, head, INSIDE: tl.constexpr):
    """A tile of the gradient of the weights; 0 if there is none. As `load_terms`."""
    loaded = 0.0
    if dweights is not None:
        pointers = elements_of(dweights, index, head, origin, tl.minimum(row, len_q - 1), col)
        if INSIDE:
            loaded = tl.load(pointers).to(tl.float32)
        else:
            loaded = tl.load(pointers, mask=col < len_k, other=0.0).to(tl.float32)
    return loaded


@triton.jit
def softmax_gradient(p, dp, dweights, delta, keep, terms, scalars):
    """Gradient of the score: p (dp - delta), where dp is that of the undropped probabilities.

    `dp` comes in as dout v^T, `dweights` as what is to be added to it.
    """
    dp = dp + dweights
    if terms.rng is not None:
        dp = tl.where(keep != 0, dp * scalars.keep_scale, 0.0)
    return p * (dp - delta)


@triton.jit(do_not_specialize=["seqlen_q", "num_heads"])
def _attention_delta_kernel(
    out, dout, dlse, delta, seqlen_q, num_heads, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse of ROWS queries of one head."""
    tiles = tl.cdiv(seqlen_q, ROWS)
    plane, row0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * ROWS
    batch, head = plane // num_heads, plane % num_heads
    x = load_rows(out, None, batch, head, row0, seqlen_q - 1, ROWS, SIZE, BLOCK)
    dx = load_rows(dout, None, batch, head, row0, seqlen_q - 1, ROWS, SIZE, BLOCK)
    total = tl.sum(x.to(tl.float32) * dx.to(tl.float32), 1)
    row = row0 + tl.arange(0, ROWS)
    inside = row < seqlen_q
    if dlse is not None:
        shares = head_of(dlse, batch, head) + row.to(tl.int64) * dlse.strides[2]
        total -= tl.load(shares, mask=inside, other=0.0)
    tl.store(delta + plane.to(tl.int64) * seqlen_q + row, total, mask=inside)


@triton.jit
def _accumulate_queries(
    dk, dv, key, value, from_k, from_v, q, dout, rows, dweights, n0, head, where, queries, tiles,
    terms, sizes, scalars, MASKED: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Add what the queries of tiles [a, b) and [c, d) of one head give to a tile of keys."""
    batch, index, start_q, len_q, len_k = where
    visited, a, b, c, d = walk(terms, batch, head, n0 // CONFIG.BLOCK_N, tiles)
    HIDING: tl.constexpr = MASKED or (terms.mask is not None) or (terms.bias is not None)
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[:, None]
    low, high = queries
    last = start_q + len_q - 1
    for i in tl.range(a, b + d - c):
        m0 = tile_at(i, b, c, visited, terms) * CONFIG.BLOCK_M
        row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[None, :]
        query = load_rows(q, None, index, head, start_q + m0, last, CONFIG.BLOCK_M,
                          CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        loaded = load_terms((m0, n0), row, col, len_q, len_k, index, head, terms, not MASKED)
        dw = load_dweights(dweights, (m0, n0), row, col, len_q, len_k, index, head, not MASKED)
        qk = products(key, query, from_k, (q, head, start_q + m0, last), index, CONFIG.BLOCK_N,
                      CONFIG.BLOCK_M, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED,
                      CONFIG)  # fmt: skip
        s, factor, slope = score(qk, loaded, row, col, len_q, len_k, head, terms, scalars, CONFIG)
        if MASKED:
            s = hide(s, row, low, high)
        p = probability(s, factor, rows, index, head, start_q, row, len_q, sizes)
        delta = load_delta(rows, index, head, start_q, row, len_q, sizes)
        keep = 0
        kept = p
        if terms.rng is not None:
            position = m0 + tl.arange(0, CONFIG.BLOCK_M)
            keep = tl.trans(keep_mask(terms, scalars, position, n0, batch * sizes.num_heads + head,
                                      CONFIG.BLOCK_M, CONFIG.BLOCK_N))  # fmt: skip
            kept = tl.where(keep != 0, p * scalars.keep_scale, 0.0)
        doutput = load_rows(dout, None, index, head, start_q + m0, last, CONFIG.BLOCK_M,
                            CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV, not MASKED)  # fmt: skip
        dv = tl.dot(kept.to(doutput.dtype), doutput, dv, input_precision=CONFIG.PRECISION)
        dp = products(value, doutput, from_v, (dout, head, start_q + m0, last), index,
                      CONFIG.BLOCK_N, CONFIG.BLOCK_M, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV,
                      not MASKED, CONFIG)  # fmt: skip
        ds = softmax_gradient(p, dp, dw, delta, keep, terms, scalars)
        ds = ds * slope
        if HIDING:
            ds = tl.where(p == 0.0, 0.0, ds)  # what is hidden may be NaN
        if CONFIG.BLOCK_D > CONFIG.CHUNK:  # loaded above it would fill registers all the while
            query = load_rows(q, None, index, head, start_q + m0, last, CONFIG.BLOCK_M,
                              CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=CONFIG.PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["sizes", "scalars", "num_tiles"])
def _attention_backward_dkdv_kernel(
    q, k, v, dout, rows, dk, dv, dweights, terms, sizes, scalars,
    num_tiles, CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one key head, from all queries of its group."""
    # Under a causal band the first keys are seen most: they start first, of all heads.
    program = tl.program_id(0)
    if CONFIG.BAND:
        planes = tl.num_programs(0) // num_tiles
        tile, plane = program // planes, program % planes
    else:
        tile, plane = program % num_tiles, program // num_tiles
    num_heads_kv = sizes.num_heads // sizes.group
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    start_q, len_q, start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    n0 = tile * CONFIG.BLOCK_N
    if n0 >= len_k:
        return
    first, end, holes = present_keys(terms, batch, len_k)
    end_n = tl.minimum(n0 + CONFIG.BLOCK_N, end)
    # Keys past the last one count as seen: nothing of them is stored.
    whole = (holes == 0) & (n0 >= first) & ((n0 + CONFIG.BLOCK_N <= end) | (end == len_k))
    a, b, c, d = visible_queries(tl.maximum(n0, first), end_n, len_q, shift, whole, scalars, CONFIG)
    last = start_k + len_k - 1
    key = load_rows(k, None, index, head_kv, start_k + n0, last, CONFIG.BLOCK_N, CONFIG.HEAD_DIM,
                    CONFIG.BLOCK_D)  # fmt: skip
    value = load_rows(v, None, index, head_kv, start_k + n0, last, CONFIG.BLOCK_N,
                      CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    from_k = (k, head_kv, start_k + n0, last)
    from_v = (v, head_kv, start_k + n0, last)
    dkey = tl.zeros([CONFIG.BLOCK_N, CONFIG.BLOCK_D], tl.float32)
    dvalue = tl.zeros([CONFIG.BLOCK_N, CONFIG.BLOCK_DV], tl.float32)
    where = (batch, index, start_q, len_q, len_k)
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[:, None]
    queries = queries_of_key(col, len_q, shift, first, end, index, terms, scalars, CONFIG)
    for member in range(sizes.group):
        head = head_kv * sizes.group + member
        dkey, dvalue = _accumulate_queries(
            dkey, dvalue, key, value, from_k, from_v, q, dout, rows, dweights, n0, head, where,
            queries, (b, c, 0, 0), terms, sizes, scalars, False, CONFIG,
        )  # fmt: skip
        dkey, dvalue = _accumulate_queries(
            dkey, dvalue, key, value, from_k, from_v, q, dout, rows, dweights, n0, head, where,
            queries, (a, b, c, d), terms, sizes, scalars, True, CONFIG,
        )  # fmt: skip
    stop = start_k + len_k
    if dk is not None:
        store_rows(dk, index, head_kv, start_k + n0, stop, dkey * scalars.scale, CONFIG.BLOCK_N,
                   CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    if dv is not None:
        store_rows(dv, index, head_kv, start_k + n0, stop, dvalue, CONFIG.BLOCK_N,
                   CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip


@triton.jit
def _accumulate_keys(
    dq, query, doutput, from_q, from_dout, rows, delta, k, v, dweights, m0, where, keys, tiles,
    terms, sizes, scalars, MASKED: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Add what the keys of tiles [a, b) and [c, d) give to a tile of queries."""
    batch, head, index, start_q, len_q, start_k, len_k, shift = where
    low, high, first, end = keys
    visited, a, b, c, d = walk(terms, batch, head, m0 // CONFIG.BLOCK_M, tiles)
    HIDING: tl.constexpr = MASKED or (terms.mask is not None) or (terms.bias is not None)
    row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[:, None]
    row_low, row_high = keys_of_query(row, len_q, shift, first, end, scalars, CONFIG)
    last = start_k + len_k - 1
    for i in tl.range(a, b + d - c):
        n0 = tile_at(i, b, c, visited, terms) * CONFIG.BLOCK_N
        key_index = n0 + tl.arange(0, CONFIG.BLOCK_N)
        col = key_index[None, :]
        key = load_rows(k, None, index, head // sizes.group, start_k + n0, last,
                        CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        value = load_rows(v, None, index, head // sizes.group, start_k + n0, last,
                          CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV,
                          not MASKED)  # fmt: skip
        loaded = load_terms((m0, n0), row, col, len_q, len_k, index, head, terms, not MASKED)
        dw = load_dweights(dweights, (m0, n0), row, col, len_q, len_k, index, head, not MASKED)
        head_kv = head // sizes.group
        qk = products(query, key, from_q, (k, head_kv, start_k + n0, last), index, CONFIG.BLOCK_M,
                      CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED,
                      CONFIG)  # fmt: skip
        dp = products(doutput, value, from_dout, (v, head_kv, start_k + n0, last), index,
                      CONFIG.BLOCK_M, CONFIG.BLOCK_N, CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV,
                      not MASKED, CONFIG)  # fmt: skip
        s, factor, slope = score(qk, loaded, row, col, len_q, len_k, head, terms, scalars, CONFIG)
        if MASKED:
            s = hide_keys(s, col, row_low, row_high, len_k, index, terms)
        p = probability(s, factor, rows, index, head, start_q, row, len_q, sizes)
        keep = 0
        if terms.rng is not None:
            position = m0 + tl.arange(0, CONFIG.BLOCK_M)
            keep = keep_mask(terms, scalars, position, n0, batch * sizes.num_heads + head,
                             CONFIG.BLOCK_M, CONFIG.BLOCK_N)  # fmt: skip
        ds = softmax_gradient(p, dp, dw, delta[:, None], keep, terms, scalars)
        ds = ds * slope
        if CONFIG.BLOCK_D > CONFIG.CHUNK:
            key = load_rows(k, None, index, head_kv, start_k + n0, last, CONFIG.BLOCK_N,
                            CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED)  # fmt: skip
        if HIDING:
            ds = tl.where(p == 0.0, 0.0, ds)  # what is hidden may be NaN
            key = only_seen(key, p, key_index, low, high, terms)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=CONFIG.PRECISION)
    return dq


@triton.jit(do_not_specialize=["sizes", "scalars", "num_tiles"])
def _attention_backward_dq_kernel(
    q, k, v, dout, rows, dq, dweights, terms, sizes, scalars, num_tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head."""
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
    low, high, a, b, c, d = visible_keys(m0, end_m, shift, first, end, holes, scalars, CONFIG)
    last = start_q + len_q - 1
    query = load_rows(q, None, index, head, start_q + m0, last, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                      CONFIG.BLOCK_D)  # fmt: skip
    doutput = load_rows(dout, None, index, head, start_q + m0, last, CONFIG.BLOCK_M,
                        CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    from_q, from_dout = (q, head, start_q + m0, last), (dout, head, start_q + m0, last)
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    delta = load_delta(rows, index, head, start_q, row, len_q, sizes)
    dquery = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_D], tl.float32)
    where = (batch, head, index, start_q, len_q, start_k, len_k, shift)
    keys = (low, high, first, end)
    dquery = _accumulate_keys(
        dquery, query, doutput, from_q, from_dout, rows, delta, k, v, dweights, m0, where, keys,
        (b, c, 0, 0), terms, sizes, scalars, False, CONFIG,
    )  # fmt: skip
    dquery = _accumulate_keys(
        dquery, query, doutput, from_q, from_dout, rows, delta, k, v, dweights, m0, where, keys,
        (a, b, c, d), terms, sizes, scalars, True, CONFIG,
    )  # fmt: skip
    store_rows(dq, index, head, start_q + m0, start_q + len_q, dquery * scalars.scale,
               CONFIG.BLOCK_M, CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
