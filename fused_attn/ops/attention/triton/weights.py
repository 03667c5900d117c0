"""Attention weights from lse, tile by tile, and what their gradient adds to delta."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import load_dweights
from .primitives import (
    elements_of,
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
    tile_at,
    visible_keys,
    walk,
)


@triton.jit
def dropped_probabilities(q, k, rows, batch, head, m0, n0, terms, sizes, scalars,
                          CONFIG: tl.constexpr):  # fmt: skip
    """softmax(score) after dropout of one tile, 0 where hidden or outside."""
    start_q, len_q, _start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    first, end, _holes = present_keys(terms, batch, len_k)
    row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[:, None]
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[None, :]
    query = load_rows(q, None, index, head, m0, len_q - 1, CONFIG.BLOCK_M, CONFIG.HEAD_DIM,
                      CONFIG.BLOCK_D)  # fmt: skip
    key = load_rows(k, None, index, head // sizes.group, n0, len_k - 1, CONFIG.BLOCK_N,
                    CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
    loaded = load_terms((m0, n0), row, col, len_q, len_k, index, head, terms, False)
    qk = products(query, key, (q, head, m0, len_q - 1), (k, head // sizes.group, n0, len_k - 1),
                  index, CONFIG.BLOCK_M, CONFIG.BLOCK_N, CONFIG.HEAD_DIM, CONFIG.BLOCK_D, False,
                  CONFIG)  # fmt: skip
    s, factor, _slope = score(qk, loaded, row, col, len_q, len_k, head, terms, scalars, CONFIG)
    low, high = keys_of_query(row, len_q, shift, first, end, scalars, CONFIG)
    s = hide_keys(s, col, low, high, len_k, index, terms)
    p = probability(s, factor, rows, index, head, start_q, row, len_q, sizes)
    if terms.rng is not None:
        position = m0 + tl.arange(0, CONFIG.BLOCK_M)
        keep = keep_mask(terms, scalars, position, n0, batch * sizes.num_heads + head,
                         CONFIG.BLOCK_M, CONFIG.BLOCK_N)  # fmt: skip
        p = tl.where(keep != 0, p * scalars.keep_scale, 0.0)
    return p


@triton.jit(do_not_specialize=["sizes", "scalars", "tiles_m", "tiles_n"])
def _attention_weights_kernel(
    q, k, rows, weights, terms, sizes, scalars, tiles_m, tiles_n, CONFIG: tl.constexpr
):  # fmt: skip
    """One tile of the weights of one head or, summed on the fly, of the average over heads."""
    program = tl.program_id(0)
    tile_n, program = program % tiles_n, program // tiles_n
    tile_m, plane = program % tiles_m, program // tiles_m
    heads = 1 if CONFIG.AVERAGE else sizes.num_heads
    batch, first_head = plane // heads, plane % heads
    m0, n0 = tile_m * CONFIG.BLOCK_M, tile_n * CONFIG.BLOCK_N
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_N], tl.float32)
    members = sizes.num_heads if CONFIG.AVERAGE else 1
    for member in tl.range(0, members):
        head = first_head + member
        if is_visited(m0, n0, batch, head, terms, sizes, scalars, CONFIG):
            acc += dropped_probabilities(q, k, rows, batch, head, m0, n0, terms, sizes, scalars,
                                         CONFIG)  # fmt: skip
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)[:, None]
    col = n0 + tl.arange(0, CONFIG.BLOCK_N)[None, :]
    target = elements_of(weights, batch, first_head, (m0, n0), row, col)
    inside = (row < sizes.seqlen_q) & (col < sizes.seqlen_k)
    tl.store(target, (acc / members).to(weights.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["sizes", "scalars", "num_tiles"])
def _attention_weights_delta_kernel(
    q, k, rows, dweights, terms, sizes, scalars, num_tiles, CONFIG: tl.constexpr
):  # fmt: skip
    """delta += rowsum(dweights * weights) of BLOCK_M queries of one head."""
    tile, plane = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    batch, head = plane // sizes.num_heads, plane % sizes.num_heads
    _start_q, len_q, _start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    m0 = tile * CONFIG.BLOCK_M
    first, end, holes = present_keys(terms, batch, len_k)
    end_m = tl.minimum(m0 + CONFIG.BLOCK_M, len_q)
    _low, _high, tile_n, _full, _past_full, past = visible_keys(
        m0, end_m, shift, first, end, holes, scalars, CONFIG
    )
    row = m0 + tl.arange(0, CONFIG.BLOCK_M)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    visited, a, b, _c, _d = walk(terms, batch, head, tile, (tile_n, past, 0, 0))
    for i in tl.range(a, b):
        n0 = tile_at(i, b, b, visited, terms) * CONFIG.BLOCK_N
        col = n0 + tl.arange(0, CONFIG.BLOCK_N)
        p = dropped_probabilities(q, k, rows, batch, head, m0, n0, terms, sizes, scalars, CONFIG)
        dp = load_dweights(dweights, (m0, n0), row[:, None], col[None, :], len_q, len_k, index,
                           head, False)  # fmt: skip
        total += tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)
    target = rows.delta + (index * sizes.num_heads + head) * sizes.seqlen_q + row
    inside = row < len_q
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)
