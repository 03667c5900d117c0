"""Few queries, many keys: the keys are split among programs, and their partial results combined.

The queries of all heads that share a key head make up one tile of rows, so that keys and values are
read once. Dao et al. 2023, "Flash-Decoding". How many splits there are depends on the sizes of the
tensors alone: a captured CUDA graph stays right as the lengths change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import softmax_update
from .primitives import (
    INFINITY,
    LN2,
    head_of,
    hide_keys,
    keep_mask,
    keys_of_query,
    load_rows,
    load_terms,
    locate,
    only_seen,
    present_keys,
    score,
    tile_at,
    visible_keys,
    walk,
)


@triton.jit
def _load_packed_rows(q, index, head, position, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                      col0=0):  # fmt: skip
    """Rows of several heads, (rows, BLOCK), from column `col0` on."""
    col = col0 + tl.arange(0, BLOCK)
    pointers = head_of(q, index, head) + position.to(tl.int64) * q.strides[2]
    pointers = pointers[:, None] + col[None, :] * q.strides[3]
    return tl.load(pointers, mask=valid[:, None] & (col[None, :] < SIZE), other=0.0)


@triton.jit(do_not_specialize=["sizes", "scalars", "splits", "max_seqlen_q"])
def _attention_decode_kernel(
    q, k, v, partial, peaks, totals, terms, sizes, scalars, splits, max_seqlen_q,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """One split of the keys for all queries of one key head; unnormalised."""
    split, plane = tl.program_id(0) % splits, tl.program_id(0) // splits
    num_heads_kv = sizes.num_heads // sizes.group
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    start_q, len_q, start_k, len_k, shift, index = locate(terms, sizes, scalars, batch)
    packed = tl.arange(0, CONFIG.BLOCK_M)
    head, row = head_kv * sizes.group + packed % sizes.group, packed // sizes.group
    valid = row < len_q
    query = _load_packed_rows(q, index, head, start_q + row, valid, CONFIG.HEAD_DIM, CONFIG.BLOCK_D)

    first, end, holes = present_keys(terms, batch, len_k)
    zero = batch * 0
    low, high, tile_n, _full, _past_full, past = visible_keys(
        zero, len_q, shift, first, end, holes, scalars, CONFIG
    )
    # All heads of the group share the list of the first, and splits share what it holds.
    visited, a, b, _c, _d = walk(terms, batch, head_kv * sizes.group, zero, (tile_n, past, 0, 0))
    share = tl.cdiv(b - a, splits)
    start = a + split * share
    row_low, row_high = keys_of_query(row[:, None], len_q, shift, first, end, scalars, CONFIG)
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_DV], tl.float32)
    peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    last = start_k + len_k - 1
    heads = head[:, None]
    for i in tl.range(start, tl.minimum(start + share, b)):
        n0 = tile_at(i, b, b, visited, terms) * CONFIG.BLOCK_N
        col = n0 + tl.arange(0, CONFIG.BLOCK_N)
        key = load_rows(k, None, index, head_kv, start_k + n0, last, CONFIG.BLOCK_N,
                        CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
        loaded = load_terms((zero, n0), row[:, None], col[None, :], len_q, len_k, index, heads,
                            terms, False)  # fmt: skip
        if CONFIG.BLOCK_D <= CONFIG.CHUNK:
            qk = tl.dot(query, tl.trans(key), input_precision=CONFIG.PRECISION)
        else:  # as in `primitives.products`
            qk = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_N], tl.float32)
            for col0 in tl.range(0, CONFIG.HEAD_DIM, CONFIG.CHUNK, disable_licm=True):
                left = _load_packed_rows(q, index, head, start_q + row, valid, CONFIG.HEAD_DIM,
                                         CONFIG.CHUNK, col0)  # fmt: skip
                right = load_rows(k, None, index, head_kv, start_k + n0, last, CONFIG.BLOCK_N,
                                  CONFIG.HEAD_DIM, CONFIG.CHUNK, False, col0)  # fmt: skip
                qk = tl.dot(left, tl.trans(right), qk, input_precision=CONFIG.PRECISION)
        s, factor, _slope = score(
            qk, loaded, row[:, None], col[None, :], len_q, len_k, heads, terms, scalars, CONFIG
        )
        s = hide_keys(s, col[None, :], row_low, row_high, len_k, index, terms)
        p, shrink, peak, total = softmax_update(s, factor, peak, total, True)
        kept = p
        if terms.rng is not None:
            keep = keep_mask(terms, scalars, row, n0, batch * sizes.num_heads + heads,
                             CONFIG.BLOCK_M, CONFIG.BLOCK_N)  # fmt: skip
            kept = tl.where(keep != 0, p, 0.0)
        value = load_rows(v, None, index, head_kv, start_k + n0, last, CONFIG.BLOCK_N,
                          CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
        value = only_seen(value, p, col, low, high, terms)
        acc = tl.dot(kept.to(value.dtype), value, acc * shrink[:, None],
                     input_precision=CONFIG.PRECISION)  # fmt: skip

    at = (batch * sizes.num_heads + head).to(tl.int64) * max_seqlen_q + row
    at = at * splits + split
    col = tl.arange(0, CONFIG.BLOCK_DV)
    pointers = partial + at[:, None] * CONFIG.BLOCK_DV + col[None, :]
    tl.store(pointers, acc, mask=(row < max_seqlen_q)[:, None])
    tl.store(peaks + at, peak, mask=row < max_seqlen_q)
    tl.store(totals + at, total, mask=row < max_seqlen_q)


@triton.jit(do_not_specialize=["sizes", "scalars", "splits", "max_seqlen_q"])
def _attention_combine_kernel(
    partial, peaks, totals, out, lse, terms, sizes, scalars, splits, max_seqlen_q,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """One row of the output from its splits."""
    row, plane = tl.program_id(0) % max_seqlen_q, tl.program_id(0) // max_seqlen_q
    batch, head = plane // sizes.num_heads, plane % sizes.num_heads
    start_q, len_q, _start_k, _len_k, _shift, index = locate(terms, sizes, scalars, batch)
    if row >= len_q:
        return
    split = tl.arange(0, CONFIG.SPLITS)
    col = tl.arange(0, CONFIG.BLOCK_DV)
    at = tl.program_id(0).to(tl.int64) * splits + split
    present = split < splits
    peak = tl.load(peaks + at, mask=present, other=-INFINITY)
    highest = tl.max(peak, 0)
    anchor = tl.where(highest == -INFINITY, 0.0, highest)
    weight = tl.exp2(peak - anchor)
    total = tl.sum(weight * tl.load(totals + at, mask=present, other=0.0), 0)
    pointers = partial + at[:, None] * CONFIG.BLOCK_DV + col[None, :]
    rows = tl.load(pointers, mask=present[:, None], other=0.0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    result = tl.sum(rows * weight[:, None], 0) * (scalars.keep_scale / total)
    target = head_of(out, index, head) + (start_q + row).to(tl.int64) * out.strides[2]
    tl.store(target + col * out.strides[3], result.to(out.ptr.dtype.element_ty),
             mask=col < CONFIG.HEAD_DIM_V)  # fmt: skip
    if lse is not None:
        logsumexp = tl.where(empty, -INFINITY, (highest + tl.log2(total)) * LN2)
        tl.store(lse + (index * sizes.num_heads + head) * sizes.seqlen_q + start_q + row, logsumexp)
