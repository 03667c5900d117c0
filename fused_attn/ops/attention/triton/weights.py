"""Attention weights from the row statistics, and what their gradient adds to delta."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import load_dweights
from .primitives import (
    SCALARS,
    ScoreParams,
    Sizes,
    elements_of,
    first_row,
    load_rows,
    locate,
)
from .scores import keep_mask, probabilities
from .statistics import is_noisy
from .visibility import is_visited, keys_of_query, present_keys, tile_at, visible_keys, walk


@triton.jit
def dropped_probabilities(q, k, statistics, m0, n0, sequence, head, terms, sizes, params,
                          CONFIG: tl.constexpr):  # fmt: skip
    """softmax(score) after dropout of one tile, 0 where hidden or outside."""
    first, end, _holes = present_keys(terms, sequence.batch, sequence.len_k)
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    col = n0 + tl.arange(0, CONFIG.BLOCK_N)
    index, head_kv = sequence.index, head // sizes.group
    last_q, last_k = sequence.len_q - 1, sequence.len_k - 1
    query = load_rows(q, None, index, head, m0, last_q, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                      CONFIG.BLOCK_D)  # fmt: skip
    key = load_rows(k, None, index, head_kv, n0, last_k, CONFIG.BLOCK_N, CONFIG.HEAD_DIM,
                    CONFIG.BLOCK_D)  # fmt: skip
    bounds = keys_of_query(row[:, None], sequence, first, end, params, CONFIG)
    noisy = is_noisy(statistics, m0, sequence, head, sizes, CONFIG)
    p, _slope = probabilities(
        query, key, (q, head, m0, last_q), (k, head_kv, n0, last_k), m0, n0, row[:, None],
        col[None, :], bounds, statistics, sequence, head, terms, sizes, params, noisy, True, False,
        False, CONFIG,
    )  # fmt: skip
    if terms.rng is not None:
        keep = keep_mask(row, n0, sequence, head, terms, sizes, params, CONFIG.BLOCK_M,
                         CONFIG.BLOCK_N)  # fmt: skip
        p = tl.where(keep != 0, p * params.keep_scale, 0.0)
    return p


@triton.jit(do_not_specialize=[*SCALARS, "tiles_m", "tiles_n"])
def _attention_weights_kernel(
    q, k, statistics, weights, terms, num_heads, group, seqlen_q, seqlen_k, scale, softcap, left,
    right, lower_right, threshold, keep_scale, chunk, tiles_m, tiles_n, CONFIG: tl.constexpr,
):  # fmt: skip
    """One tile of the weights of one head or, summed on the fly, of the average over heads."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    program = tl.program_id(0)
    tile_n, program = program % tiles_n, program // tiles_n
    tile_m, plane = program % tiles_m, program // tiles_m
    heads = 1 if CONFIG.AVERAGE else num_heads
    batch, first_head = plane // heads, plane % heads
    sequence = locate(terms, sizes, params, batch, CONFIG)
    m0, n0 = tile_m * CONFIG.BLOCK_M, tile_n * CONFIG.BLOCK_N
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_N], tl.float32)
    members = num_heads if CONFIG.AVERAGE else 1
    for member in tl.range(0, members):
        head = first_head + member
        visits = is_visited(m0, n0, head, sequence, terms, params, CONFIG)
        # No `if`: for sm_100 Triton 3.6.0 fails to compile a product within one within a loop.
        for _ in tl.range(0, visits.to(tl.int32)):
            acc += dropped_probabilities(q, k, statistics, m0, n0, sequence, head, terms, sizes,
                                         params, CONFIG)  # fmt: skip
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)[:, None]
    col = n0 + tl.arange(0, CONFIG.BLOCK_N)[None, :]
    target = elements_of(weights, batch, first_head, (m0, n0), row, col, CONFIG.ALIGNED)
    inside = (row < seqlen_q) & (col < seqlen_k)
    tl.store(target, (acc / members).to(weights.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*SCALARS, "num_tiles"])
def _attention_weights_delta_kernel(
    q, k, statistics, dweights, terms, num_heads, group, seqlen_q, seqlen_k, scale, softcap, left,
    right, lower_right, threshold, keep_scale, chunk, num_tiles, CONFIG: tl.constexpr,
):  # fmt: skip
    """delta += rowsum(dweights * weights) of BLOCK_M queries of one head."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    tile, plane = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    sequence = locate(terms, sizes, params, plane // num_heads, CONFIG)
    head = plane % num_heads
    m0 = tile * CONFIG.BLOCK_M
    _keys, tiles = visible_keys(m0, sequence, terms, params, CONFIG)
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    visited, a, b, _c, _d = walk(terms, sequence, head, tile, (tiles[0], tiles[3], 0, 0))
    for i in tl.range(a, b):
        n0 = tile_at(i, b, b, visited, terms) * CONFIG.BLOCK_N
        col = n0 + tl.arange(0, CONFIG.BLOCK_N)
        p = dropped_probabilities(q, k, statistics, m0, n0, sequence, head, terms, sizes, params,
                                  CONFIG)  # fmt: skip
        dp = load_dweights(dweights, m0, n0, row[:, None], col[None, :], sequence, head, False,
                           CONFIG)  # fmt: skip
        total += tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)
    target = statistics.delta + first_row(sequence, head, sizes) + row
    inside = row < sequence.len_q
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)
