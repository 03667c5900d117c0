"""Few queries, many keys: the keys are split among programs, and their partial results combined.

The queries of all heads that share a key head make up one tile of rows, so that keys and values are
read once. Dao et al. 2023, "Flash-Decoding". How many splits there are depends on the sizes of the
tensors alone: a captured CUDA graph stays right as the lengths change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    INFINITY,
    LN2,
    LOG2E,
    SCALARS,
    ScoreParams,
    Sizes,
    first_row,
    head_of,
    load_packed_rows,
    load_rows,
    locate,
)
from .scores import keep_mask, only_seen, scores, softmax_update
from .visibility import keys_of_query, tile_at, visible_keys, walk


@triton.jit(do_not_specialize=[*SCALARS, "splits", "max_seqlen_q"])
def _attention_decode_kernel(
    q, k, v, partial, peaks, totals, terms, num_heads, group, seqlen_q, seqlen_k, scale, softcap,
    left, right, lower_right, threshold, keep_scale, chunk, splits, max_seqlen_q,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """One split of the keys for all queries of one key head; unnormalised."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    split, plane = tl.program_id(0) % splits, tl.program_id(0) // splits
    num_heads_kv = num_heads // group
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    sequence = locate(terms, sizes, params, batch, CONFIG)
    packed = tl.arange(0, CONFIG.BLOCK_M)
    head, row = head_kv * group + packed % group, packed // group
    position = tl.where(row < sequence.len_q, sequence.start_q + row, -1)
    query = load_packed_rows(q, sequence.index, head, position, CONFIG.HEAD_DIM, CONFIG.BLOCK_D)

    zero = batch * 0
    keys, tiles = visible_keys(zero, sequence, terms, params, CONFIG)
    low, high, first, end = keys
    # All heads of the group share the list of the first, and splits share what it holds.
    visited, a, b, _c, _d = walk(terms, sequence, head_kv * group, zero, (tiles[0], tiles[3], 0, 0))
    share = tl.cdiv(b - a, splits)
    start = a + split * share
    bounds = keys_of_query(row[:, None], sequence, first, end, params, CONFIG)
    acc = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_DV], tl.float32)
    peak = tl.full([CONFIG.BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([CONFIG.BLOCK_M], tl.float32)
    last = sequence.start_k + sequence.len_k - 1
    heads = head[:, None]
    for i in tl.range(start, tl.minimum(start + share, b)):
        n0 = tile_at(i, b, b, visited, terms) * CONFIG.BLOCK_N
        first_key = sequence.start_k + n0
        col = n0 + tl.arange(0, CONFIG.BLOCK_N)
        key = load_rows(k, None, sequence.index, head_kv, first_key, last, CONFIG.BLOCK_N,
                        CONFIG.HEAD_DIM, CONFIG.BLOCK_D)  # fmt: skip
        s, unit, _slope, _qk = scores(
            query, key, (q, head, position, None), (k, head_kv, first_key, last), zero, n0,
            row[:, None], col[None, :], bounds, sequence, heads, terms, sizes, params, None, True,
            False, False, CONFIG,
        )  # fmt: skip
        p, shrink, peak, total = softmax_update(s, unit, peak, total, True, True)
        kept = p
        if terms.rng is not None:
            keep = keep_mask(row, n0, sequence, heads, terms, sizes, params, CONFIG.BLOCK_M,
                             CONFIG.BLOCK_N)  # fmt: skip
            kept = tl.where(keep != 0, p, 0.0)
        value = load_rows(v, None, sequence.index, head_kv, first_key, last, CONFIG.BLOCK_N,
                          CONFIG.HEAD_DIM_V, CONFIG.BLOCK_DV)  # fmt: skip
        value = only_seen(value, p, col, low, high, terms, CONFIG)
        acc = tl.dot(kept.to(value.dtype), value, acc * shrink[:, None],
                     input_precision=CONFIG.PRECISION)  # fmt: skip

    at = (batch * num_heads + head).to(tl.int64) * max_seqlen_q + row
    at = at * splits + split
    col = tl.arange(0, CONFIG.BLOCK_DV)
    pointers = partial + at[:, None] * CONFIG.BLOCK_DV + col[None, :]
    tl.store(pointers, acc, mask=(row < max_seqlen_q)[:, None])
    tl.store(peaks + at, peak, mask=row < max_seqlen_q)
    tl.store(totals + at, total, mask=row < max_seqlen_q)


@triton.jit(do_not_specialize=[*SCALARS, "splits", "max_seqlen_q"])
def _attention_combine_kernel(
    partial, peaks, totals, out, lse, terms, num_heads, group, seqlen_q, seqlen_k, scale, softcap,
    left, right, lower_right, threshold, keep_scale, chunk, splits, max_seqlen_q,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """One row of the output from its splits."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    row, plane = tl.program_id(0) % max_seqlen_q, tl.program_id(0) // max_seqlen_q
    sequence = locate(terms, sizes, params, plane // num_heads, CONFIG)
    head = plane % num_heads
    if row >= sequence.len_q:
        return
    split = tl.arange(0, CONFIG.SPLITS)
    col = tl.arange(0, CONFIG.BLOCK_DV)
    at = tl.program_id(0).to(tl.int64) * splits + split
    present = split < splits
    peak = tl.load(peaks + at, mask=present, other=-INFINITY)
    highest = tl.max(peak, 0)
    anchor = tl.where(highest == -INFINITY, 0.0, highest)
    unit = 1.0 if CONFIG.MODIFIED else scale  # of a peak, as `score` has it
    weight = tl.exp2((peak - anchor) * (unit * LOG2E))
    total = tl.sum(weight * tl.load(totals + at, mask=present, other=0.0), 0)
    pointers = partial + at[:, None] * CONFIG.BLOCK_DV + col[None, :]
    rows = tl.load(pointers, mask=present[:, None], other=0.0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    result = tl.sum(rows * weight[:, None], 0) * (keep_scale / total)
    target = head_of(out, sequence.index, head)
    target += (sequence.start_q + row).to(tl.int64) * out.strides[2]
    tl.store(target + col * out.strides[3], result.to(out.ptr.dtype.element_ty),
             mask=col < CONFIG.HEAD_DIM_V)  # fmt: skip
    if lse is not None:
        logsumexp = tl.where(empty, -INFINITY, highest * unit + tl.log2(total) * LN2)
        tl.store(lse + first_row(sequence, head, sizes) + row, logsumexp)
