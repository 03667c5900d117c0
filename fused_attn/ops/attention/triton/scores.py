"""Scores and probabilities of one tile: load, multiply, score, hide, exponential, dropout.

Every kernel that works on scores goes through `scores` or, where the row statistics are known,
`probabilities`. TRANSPOSED: a tile of keys by queries, as the kernel that owns keys has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    INFINITY,
    LOG2E,
    elements_of,
    first_row,
    products,
    products_in_order,
)
from .visibility import load_padding, present_keys, queries_of_key

LARGEST = tl.constexpr(3.4028234663852886e38)  # of the finite float32
# Scores beyond this are so coarse that the rounding of an lse or of a scaled maximum shows in
# their exponentials.
COARSE = tl.constexpr(1e4)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to about a unit in the last place: Cephes (Moshier 1989), tanhf."""
    z = x * x
    small = -5.70498872745e-3 * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    small = small * z * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def same_document(row, col, sequence, terms, sizes):
    """Where query and key have one id, on a tile; what is past the last row counts as the last."""
    row = sequence.start_q + tl.minimum(row, sequence.len_q - 1)
    col = sequence.start_k + tl.minimum(col, sequence.len_k - 1)
    of_query = tl.load(terms.query_ids + sequence.index * sizes.seqlen_q + row)
    return of_query == tl.load(terms.key_ids + sequence.index * sizes.seqlen_k + col)


@triton.jit
def load_terms(m0, n0, row, col, sequence, head, terms, sizes, INSIDE: tl.constexpr,
               CONFIG: tl.constexpr):  # fmt: skip
    """A tile of bias, of bool mask and documents in one, and what functions of pairs load.

    0 for what is absent.

    INSIDE: all keys of the tile exist.

    To be called before the tile's q k^T. The compiler's choice of layouts depends on that order:
    loaded after it, these tiles pull the whole softmax out of the matrix unit's layout.
    """
    SEEN: tl.constexpr = CONFIG.CLASSED and INSIDE  # wholly, and nothing of the mask is asked
    bias = 0.0
    keep = 0
    extra = 0
    if terms.bias is not None:
        bias = load_scores(terms.bias, m0, n0, row, col, sequence, head, INSIDE, CONFIG)
    if (terms.mask is not None) and not SEEN:
        keep = load_scores(terms.mask, m0, n0, row, col, sequence, head, INSIDE, CONFIG)
    if (terms.query_ids is not None) and not SEEN:
        same = same_document(row, col, sequence, terms, sizes)
        keep = same if terms.mask is None else same & (keep != 0)
    if CONFIG.PAIRS:
        LOAD: tl.constexpr = CONFIG.LOAD_SEEN if SEEN else CONFIG.LOAD_PAIRS
        extra = LOAD(m0, n0, row, col, sequence, head, terms.pairs, INSIDE, CONFIG.UNIFORM)
    return bias, keep, extra


@triton.jit
def load_scores(view, m0, n0, row, col, sequence, head, INSIDE: tl.constexpr,
                CONFIG: tl.constexpr):  # fmt: skip
    """A tile of a tensor that has an element for each score; as `load_terms`."""
    row = tl.minimum(row, sequence.len_q - 1)
    pointers = elements_of(view, sequence.batch, head, (m0, n0), row, col, CONFIG.ALIGNED)
    if INSIDE:
        return tl.load(pointers)
    return tl.load(pointers, mask=col < sequence.len_k, other=0)


@triton.jit
def score(qk, loaded, m0, n0, row, col, sequence, head, terms, params, INSIDE: tl.constexpr,
          CONFIG: tl.constexpr):  # fmt: skip
    """Score of `fused_attn.attention` from q k^T: (s, scale, slope of the softcap or a function).

    The score is `s * scale`, scale > 0. What is `loaded` hides already: a bias of -inf, the bool
    mask, documents.
    """
    slope = 1.0
    if not CONFIG.MODIFIED:
        return qk, params.scale, slope
    SEEN: tl.constexpr = CONFIG.CLASSED and INSIDE
    bias, keep, extra = loaded
    s = qk * params.scale
    if CONFIG.PAIRS:
        CHANGE: tl.constexpr = CONFIG.CHANGE_SEEN if SEEN else CONFIG.CHANGE_PAIRS
        s, slope = CHANGE(s, extra, m0, n0, row, col, sequence, head, terms.pairs, INSIDE)
    if CONFIG.SOFTCAP:
        t = tanh(s / params.softcap)
        s = params.softcap * t
        slope = 1.0 - t * t
    if terms.alibi_slopes is not None:
        m = tl.load(terms.alibi_slopes.ptr + head * terms.alibi_slopes.strides[0])
        s -= m * tl.abs(row + sequence.len_k - sequence.len_q - col).to(tl.float32)
    if terms.bias is not None:
        bias = bias.to(tl.float32)
        # What is finite does not hide.
        total = tl.maximum(s + bias, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
        s = tl.where(bias == -INFINITY, bias, total)
    if ((terms.mask is not None) or (terms.query_ids is not None)) and not SEEN:
        s = tl.where(keep != 0, s, -INFINITY)
    return s, 1.0, slope


@triton.jit
def hide(s, row, col, bounds, sequence, terms, sizes, params, TRANSPOSED: tl.constexpr,
         CONFIG: tl.constexpr):  # fmt: skip
    """`s`, -inf outside the bounds, of keys or, TRANSPOSED, of queries, and where keys are padding.

    (The bounds of queries are empty where a key is padding.) With a prefix the keys of a query may
    lie apart, the queries of a key do not: then their bounds serve both.
    """
    low, high = bounds
    BY_QUERY: tl.constexpr = TRANSPOSED or (terms.prefix_lengths is not None)
    if BY_QUERY and not TRANSPOSED:
        first, end, _holes = present_keys(terms, sequence.batch, sequence.len_k)
        low, high = queries_of_key(col, sequence, first, end, terms, sizes, params, CONFIG)
    position = row if BY_QUERY else col
    s = tl.where((position >= low) & (position < high), s, -INFINITY)
    if not BY_QUERY and terms.padding is not None:
        present = load_padding(col, col < sequence.len_k, sequence.index, terms, sizes)
        s = tl.where(present != 0, s, -INFINITY)
    return s


@triton.jit
def scores(left, right, from_left, from_right, m0, n0, row, col, bounds, sequence, head, terms,
           sizes, params, noisy, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
           TRANSPOSED: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """(s, scale, slope) as by `score` of a tile, where -inf is hidden, and the products.

    MASKED: something of the tile may be hidden by position or padding, or lie outside.

    IN_ORDER: products are added up as `products_in_order` does. So they are where the number
    `noisy` says so, if there is one: a branch that a pipelined loop cannot have.
    """
    LEFT: tl.constexpr = CONFIG.BLOCK_N if TRANSPOSED else CONFIG.BLOCK_M
    RIGHT: tl.constexpr = CONFIG.BLOCK_M if TRANSPOSED else CONFIG.BLOCK_N
    loaded = load_terms(m0, n0, row, col, sequence, head, terms, sizes, not MASKED, CONFIG)
    if IN_ORDER:
        qk = products_in_order(from_left, from_right, sequence.index, LEFT, RIGHT, CONFIG.HEAD_DIM)
    else:
        qk = products(left, right, from_left, from_right, sequence.index, LEFT, RIGHT,
                      CONFIG.HEAD_DIM, CONFIG.BLOCK_D, not MASKED, CONFIG)  # fmt: skip
        if noisy is not None:  # noqa: SIM102, one is known at compile time
            if noisy != 0:
                qk = products_in_order(from_left, from_right, sequence.index, LEFT, RIGHT,
                                       CONFIG.HEAD_DIM)  # fmt: skip
    s, scale, slope = score(qk, loaded, m0, n0, row, col, sequence, head, terms, params, not MASKED,
                            CONFIG)  # fmt: skip
    if MASKED:
        s = hide(s, row, col, bounds, sequence, terms, sizes, params, TRANSPOSED, CONFIG)
    return s, scale, slope, qk


@triton.jit
def probabilities(left, right, from_left, from_right, m0, n0, row, col, bounds, statistics,
                  sequence, head, terms, sizes, params, noisy, MASKED: tl.constexpr,
                  IN_ORDER: tl.constexpr, TRANSPOSED: tl.constexpr,
                  CONFIG: tl.constexpr):  # fmt: skip
    """(softmax of the scores of a tile, slope of the softcap); 0 in a row that sees no key.

    As `scores`; where its products are in order, or may be, a probability is at most 1.
    """
    s, scale, slope, _qk = scores(left, right, from_left, from_right, m0, n0, row, col, bounds,
                                  sequence, head, terms, sizes, params, noisy, MASKED, IN_ORDER,
                                  TRANSPOSED, CONFIG)  # fmt: skip
    CAREFUL: tl.constexpr = IN_ORDER or (noisy is not None)
    at = first_row(sequence, head, sizes) + tl.minimum(row, sequence.len_q - 1)
    if CAREFUL or (terms.bias is not None) or CONFIG.PAIRS:
        s = s - tl.load(statistics.anchor + at)
    exponent = s * (scale * LOG2E) - tl.load(statistics.log + at)
    if CAREFUL:
        exponent = tl.where(exponent > 0.0, 0.0, exponent)
    return tl.exp2(exponent), slope


@triton.jit
def softmax_update(s, scale, peak, total, EMPTY: tl.constexpr, EXACT: tl.constexpr):
    """Online softmax: (exponentials under the new maximum, what shrinks the old, peak, total).

    Not EXACT: the maximum is kept scaled and rounded, which saves a subtraction for each score and
    is right up to scores of COARSE; the peak is in base 2, and in units of `s` where it is EXACT.
    EMPTY: a row may have seen no key yet, and its maximum is -inf.
    """
    factor = scale * LOG2E
    highest = tl.max(s, 1)
    if not EXACT:
        highest = highest * factor
    new_peak = tl.maximum(peak, highest)
    anchor = new_peak
    if EMPTY:
        anchor = tl.where(new_peak == -INFINITY, 0.0, new_peak)
    if EXACT:
        p = tl.exp2((s - anchor[:, None]) * factor)
        shrink = tl.exp2((peak - anchor) * factor)
    else:
        p = tl.exp2(s * factor - anchor[:, None])
        shrink = tl.exp2(peak - anchor)
    return p, shrink, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit
def only_seen(tile, p, col, low, high, terms, CONFIG: tl.constexpr):
    """`tile` of K or V, zero where no query sees the key: it may hold NaN, and 0 * NaN is NaN.

    `p` are the probabilities, (queries, keys); keys outside [low, high) are not seen.
    """
    seen = (col >= low) & (col < high)
    # Keys between a prefix and a window are hidden within the bounds.
    if CONFIG.HIDES or (terms.padding is not None) or (terms.prefix_lengths is not None):
        seen = seen & (tl.max(p, 0) > 0.0)
    return tl.where(seen[:, None], tile, tl.zeros_like(tile))


@triton.jit
def keep_mask(row, col0, sequence, head, terms, sizes, params, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Which probabilities of a tile survive the dropout, one draw for four neighbouring keys.

    `row` is (BLOCK_M,), `head` one number or (BLOCK_M, 1). The counter is that of docs/design.md:
    every backend draws the same mask.
    """
    seed = tl.load(terms.rng)
    offset = tl.load(terms.rng + 1).to(tl.uint32)
    plane = sequence.batch * sizes.num_heads + head
    quad = (col0 // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    c2, c3 = zero + plane.to(tl.uint32), zero + offset
    w0, w1, w2, w3 = tl.philox(
        seed, zero + quad[None, :], zero + row.to(tl.uint32)[:, None], c2, c3
    )
    limit = params.threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N])
