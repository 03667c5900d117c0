"""Row statistics: what the backward and the weights recompute probabilities from, and delta.

Up to scores of COARSE lse is enough. Beyond, its rounding shows in exp(score - lse): such rows get
their largest score and the logarithm of their sum of exponentials anew, as two numbers. They are of
two kinds. A bias that "hides" keys by the lowest number leaves rows in which all scores are huge
and equal; nothing else is special about them. But where the products themselves are huge, their
rounding decides who is seen, and kernels must agree on it: such rows are noisy, and all products
of their scores, and of their gradients, are added up in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    INFINITY,
    LOG2E,
    SCALARS,
    ScoreParams,
    Sizes,
    first_row,
    load_rows,
    locate,
    row_products_in_order,
    stride_of,
)
from .scores import COARSE, scores, softmax_update
from .visibility import keys_of_query, tile_at, visible_keys, walk

GRAIN = tl.constexpr(16)  # queries that share a flag; no tile has fewer
_FLAGS = tl.constexpr(256)  # that a program looks at together


@triton.jit
def is_noisy(statistics, m0, sequence, head, sizes, CONFIG: tl.constexpr):
    """Whether one of the BLOCK_M queries from m0 on is noisy."""
    flag = m0 // GRAIN + tl.arange(0, CONFIG.BLOCK_M // GRAIN)
    pointers = statistics.noisy + first_row(sequence, head, sizes) + flag
    flags = tl.load(pointers, mask=flag * GRAIN < sequence.len_q, other=0)
    return tl.max(flags.to(tl.int32), 0) != 0


@triton.jit
def is_noisy_in_group(statistics, sequence, head_kv, sizes):
    """Whether any query of the heads that share a key head is noisy."""
    count = tl.cdiv(sequence.len_q, GRAIN)
    most = tl.zeros([_FLAGS], tl.int8)
    for member in range(sizes.group):
        head = head_kv * sizes.group + member
        pointers = statistics.noisy + first_row(sequence, head, sizes)
        for start in tl.range(0, count, _FLAGS):
            flag = start + tl.arange(0, _FLAGS)
            most = tl.maximum(most, tl.load(pointers + flag, mask=flag < count, other=0))
    return tl.max(most.to(tl.int32), 0) != 0


@triton.jit
def _softmax_along(rows, query, from_q, k, m0, sequence, head, keys, a, b, visited, terms, sizes,
                   params, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
                   CONFIG: tl.constexpr):  # fmt: skip
    """What `_softmax_of_rows` returns, carried on through the tiles [a, b) of a walk."""
    peak, total, largest = rows
    _low, _high, first, end = keys
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)[:, None]
    bounds = keys_of_query(row, sequence, first, end, params, CONFIG)
    head_kv = head // sizes.group
    last = sequence.start_k + sequence.len_k - 1
    for i in tl.range(a, b):
        n0 = tile_at(i, b, b, visited, terms) * CONFIG.BLOCK_N
        first_key = sequence.start_k + n0
        col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[None, :]
        key = load_rows(k, None, sequence.index, head_kv, first_key, last, CONFIG.BLOCK_N,
                        CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
        s, scale, _slope, qk = scores(
            query, key, from_q, (k, head_kv, first_key, last), m0, n0, row, col, bounds, sequence,
            head, terms, sizes, params, None, MASKED, IN_ORDER, False, CONFIG,
        )  # fmt: skip
        _p, _shrink, peak, total = softmax_update(s, scale, peak, total, True, True)
        product = tl.where(s == -INFINITY, 0.0, tl.abs(qk * params.scale))
        largest = tl.maximum(largest, tl.max(product, 1))
    return peak, total, largest


@triton.jit
def _softmax_of_rows(query, from_q, k, m0, tile, sequence, head, keys, tiles, wanted, terms, sizes,
                     params, IN_ORDER: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """(largest score in units of `score`, sum of exponentials, largest product) of each row.

    Of no tile if not `wanted`. IN_ORDER, which is slow and seldom, all tiles count as masked: one
    more loop would spill.
    """
    peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
    zero = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    rows = (peak, zero, zero)
    every = (tiles[0], tiles[3], 0, 0)
    if CONFIG.CLASSED and not IN_ORDER:
        visited, a, b, _c, _d = walk(terms, sequence, head, tile, every, False)
        rows = _softmax_along(
            rows, query, from_q, k, m0, sequence, head, keys, a, tl.where(wanted, b, a), visited,
            terms, sizes, params, False, IN_ORDER, CONFIG,
        )  # fmt: skip
    visited, a, b, _c, _d = walk(terms, sequence, head, tile, every)
    if CONFIG.CLASSED and IN_ORDER:
        a = a * 0
    return _softmax_along(
        rows, query, from_q, k, m0, sequence, head, keys, a, tl.where(wanted, b, a), visited,
        terms, sizes, params, True, IN_ORDER, CONFIG,
    )  # fmt: skip


@triton.jit
def _delta(out, dout, dlse, m0, noisy, sequence, head, CONFIG: tl.constexpr):
    """rowsum(dout * out) - dlse of BLOCK_M queries."""
    first_query, last = sequence.start_q + m0, sequence.start_q + sequence.len_q - 1
    x = load_rows(out, None, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                  CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    dx = load_rows(dout, None, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                   CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
    delta = tl.sum(x.to(tl.float32) * dx.to(tl.float32), 1)
    if noisy:
        delta = row_products_in_order(
            (dout, head, first_query, last), (out, head, first_query, last), sequence.index,
            CONFIG.BLOCK_M, CONFIG.HEAD_DIM_V,
        )  # fmt: skip
    if dlse is not None:
        row = tl.minimum(first_query + tl.arange(0, CONFIG.BLOCK_M), last).to(tl.int64)
        shares = dlse.ptr + sequence.index * stride_of(dlse, 0, False)
        shares += head.to(tl.int64) * stride_of(dlse, 1, False) + row * stride_of(dlse, 2, False)
        delta -= tl.load(shares)
    return delta


@triton.jit(do_not_specialize=[*SCALARS, "num_tiles"])
def _attention_statistics_kernel(
    q, k, out, dout, dlse, lse, statistics, terms, num_heads, group, seqlen_q, seqlen_k, scale,
    softcap, left, right, lower_right, threshold, keep_scale, chunk, num_tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """The `RowStatistics` of BLOCK_M queries of one head; delta where there is `out`."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    tile, plane = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    sequence = locate(terms, sizes, params, plane // num_heads, CONFIG)
    head = plane % num_heads
    m0 = tile * CONFIG.BLOCK_M
    if m0 >= sequence.len_q:
        return
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    at = first_row(sequence, head, sizes) + row
    inside = row < sequence.len_q
    known = tl.load(lse + at, mask=inside, other=0.0)
    coarse = (tl.abs(known) > COARSE) & (tl.abs(known) != INFINITY)
    keys, tiles = visible_keys(m0, sequence, terms, params, CONFIG)
    first_query, last = sequence.start_q + m0, sequence.start_q + sequence.len_q - 1
    query = load_rows(q, None, sequence.index, head, first_query, last, CONFIG.BLOCK_M,
                      CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    from_q = (q, head, first_query, last)
    again = tl.max(coarse.to(tl.int32), 0) != 0
    peak, total = tl.zeros_like(known), tl.zeros_like(known)
    if (terms.bias is not None) or CONFIG.PAIRS:
        peak, total, largest = _softmax_of_rows(
            query, from_q, k, m0, tile, sequence, head, keys, tiles, again, terms, sizes, params,
            False, CONFIG,
        )  # fmt: skip
        again &= tl.max((coarse & (largest > COARSE)).to(tl.int32), 0) != 0
    anew, sums, _largest = _softmax_of_rows(
        query, from_q, k, m0, tile, sequence, head, keys, tiles, again, terms, sizes, params, True,
        CONFIG,
    )  # fmt: skip
    peak, total = tl.where(again, anew, peak), tl.where(again, sums, total)
    coarse &= total > 0.0
    hidden = tl.where(known == -INFINITY, INFINITY, known * LOG2E)
    tl.store(statistics.anchor + at, tl.where(coarse, peak, 0.0), mask=inside)
    log = tl.where(coarse, tl.log2(tl.where(coarse, total, 1.0)), hidden)
    tl.store(statistics.log + at, log, mask=inside)
    flag = m0 // GRAIN + tl.arange(0, CONFIG.BLOCK_M // GRAIN)
    flags = tl.zeros([CONFIG.BLOCK_M // GRAIN], tl.int8) + again.to(tl.int8)
    tl.store(statistics.noisy + first_row(sequence, head, sizes) + flag, flags,
             mask=flag * GRAIN < sequence.len_q)  # fmt: skip
    if out is not None:
        delta = _delta(out, dout, dlse, m0, again, sequence, head, CONFIG)
        tl.store(statistics.delta + at, delta, mask=inside)
