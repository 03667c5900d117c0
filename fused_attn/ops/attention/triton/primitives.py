"""What the attention kernels are made of: places, tiles, scores, visibility, random bits.

Index tensors come in shaped for broadcasting, `row` as (BLOCK_M, 1) and `col` as (1, BLOCK_N) or,
in a transposed tile, (1, BLOCK_M) and (BLOCK_N, 1): one text serves both. Row indices are clamped
to the tensor instead of masked: what a clamped index brings is hidden or not stored. Exponentials
are base 2, for which the hardware has an instruction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# A bias below this counts as this: in base 2 the smallest float32 would become -inf, which hides.
LOWEST_BIAS = tl.constexpr(-1e28)


class View(NamedTuple):
    """A tensor as a kernel sees it; a broadcast dimension has stride 0."""

    ptr: Any
    strides: Any
    last: Any = 1  # Triton 3.5 loses a constant deep within, a stride of 1, if none comes after it


class Terms(NamedTuple):
    """The optional operands of a call; None for an absent one."""

    bias: Any  # View (B, H, Lq, Lk)
    mask: Any  # View (B, H, Lq, Lk), bytes
    padding: Any  # View (B, Lk), bytes
    key_ranges: Any  # (B, 3) int32: first key of the padding mask, past the last, any hole between
    key_lengths: Any  # View (B,) int64
    alibi_slopes: Any  # View (H,)
    cu_seqlens_q: Any  # (B + 1,) int32
    cu_seqlens_k: Any
    rng: Any  # (2,) int64
    visits: Any = None  # Visits by the tiles of the kernel
    last: Any = None  # as that of View


class Visits(NamedTuple):
    """Of each own tile, the tiles of the other side that the bool mask shows anything of.

    A row holds their numbers, ascending, and from `half` on how many come before each tile.
    """

    ptr: Any  # int32
    strides: Any  # of batch, head and own tile; 0 where the mask is broadcast
    half: Any


class Rows(NamedTuple):
    """What the forward left of each query's softmax; (B, H, Lq) float32 each, dense."""

    lse: Any  # natural logarithm; in base 2 where `weight` is there
    weight: Any  # None, or what refines a probability recomputed from lse (`statistics.py`)
    delta: Any  # rowsum(dout * out) + rowsum(dweights * weights) - dlse


class Sizes(NamedTuple):
    """Numbers of a call that no kernel is specialised on."""

    num_heads: Any
    group: Any  # query heads a key head
    seqlen_q: Any  # rows of the tensors: of all sequences together in a packed call
    seqlen_k: Any


class Scalars(NamedTuple):
    """The scalars of a score."""

    scale: Any
    softcap: Any
    left: Any  # a query sees `left` keys before its diagonal and `right` after it
    right: Any
    lower_right: Any  # 1: the diagonal ends in the last query and the last key; 0: starts in first
    threshold: Any  # dropout: a word is kept iff it is at least this (uint32 as int32)
    keep_scale: Any  # what a kept probability is multiplied by


@triton.jit
def sequence(cu_seqlens, batch, seqlen):
    """(first row, number of rows) of a sequence, never outside the tensor."""
    first = batch * 0
    length = first + seqlen
    if cu_seqlens is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), seqlen)
        length = tl.minimum(tl.load(cu_seqlens + batch + 1), seqlen) - first
    return first, tl.maximum(length, 0)


@triton.jit
def locate(terms, sizes, scalars, batch):
    """(start_q, len_q, start_k, len_k, shift, index along the tensors' batch) of a sequence."""
    start_q, len_q = sequence(terms.cu_seqlens_q, batch, sizes.seqlen_q)
    start_k, len_k = sequence(terms.cu_seqlens_k, batch, sizes.seqlen_k)
    index = batch.to(tl.int64)
    if terms.cu_seqlens_q is not None:
        index = index * 0
    return start_q, len_q, start_k, len_k, (len_k - len_q) * scalars.lower_right, index


@triton.jit
def present_keys(terms, batch, len_k):
    """(first, end, holes): keys outside [first, end) are hidden; inside some may be, if holes."""
    first, end, holes = len_k * 0, len_k, len_k * 0
    if terms.key_lengths is not None:
        stride = terms.key_lengths.strides[0]
        length = tl.load(terms.key_lengths.ptr + batch.to(tl.int64) * stride)
        end = tl.minimum(tl.maximum(length, 0), end.to(tl.int64)).to(tl.int32)
    if terms.key_ranges is not None:
        first = tl.load(terms.key_ranges + batch * 3)
        end = tl.minimum(tl.load(terms.key_ranges + batch * 3 + 1), end)
        holes = tl.load(terms.key_ranges + batch * 3 + 2)
    return first, end, holes


@triton.jit
def split_tiles(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Tiles of [low, high): (first, first full, past the last full, past the last).

    A full tile lies in [full_low, full_high). There is none where the second equals the third.
    """
    first = low // BLOCK
    last = tl.where(high > low, tl.cdiv(high, BLOCK), first)
    full_first = tl.cdiv(tl.maximum(full_low, low), BLOCK)
    full_last = tl.maximum(tl.minimum(full_high, high), 0) // BLOCK
    some = full_last > full_first
    return first, tl.where(some, full_first, first), tl.where(some, full_last, first), last


@triton.jit
def visible_keys(m0, end_m, shift, first, end, holes, scalars, CONFIG: tl.constexpr):
    """Keys that a query of [m0, end_m) sees: (low, high) and the tiles of `split_tiles`."""
    low, high, full_low, full_high = first, end, first, tl.where(holes != 0, 0, end)
    if CONFIG.BAND:
        low = tl.maximum(low, m0 + shift - scalars.left)
        high = tl.minimum(high, end_m + shift + scalars.right)
        full_low = tl.maximum(full_low, end_m - 1 + shift - scalars.left)
        full_high = tl.minimum(full_high, m0 + shift + scalars.right + 1)
    high = tl.maximum(high, low)
    tile, full, past_full, past = split_tiles(low, high, full_low, full_high, CONFIG.BLOCK_N)
    return low, high, tile, full, past_full, past


@triton.jit
def visible_queries(n0, end_n, len_q, shift, whole, scalars, CONFIG: tl.constexpr):
    """Tiles of queries that see a key of [n0, end_n), as `split_tiles`.

    `whole`: none of these keys is hidden from all queries.
    """
    low, high = len_q * 0, len_q
    full_low, full_high = low, tl.where(whole, len_q, 0)
    if CONFIG.BAND:
        low = tl.maximum(low, n0 - shift - scalars.right)
        high = tl.minimum(high, end_n - shift + scalars.left)
        full_low = tl.maximum(full_low, end_n - 1 - shift - scalars.right)
        full_high = tl.minimum(full_high, n0 - shift + scalars.left + 1)
    high = tl.where(end_n > n0, tl.maximum(high, low), low)
    return split_tiles(low, high, full_low, full_high, CONFIG.BLOCK_M)


@triton.jit
def walk(terms, batch, head, own, tiles):
    """How to visit the tiles [a, b) and [c, d): (list, a, b, c, d), for `tile_at`.

    Where there are lists (`visits.py`), a to d become places in that of the tile `own`.
    """
    a, b, c, d = tiles
    row = own
    if terms.visits is not None:
        row = terms.visits.ptr + own * terms.visits.strides[2]
        row += batch.to(tl.int64) * terms.visits.strides[0] + head * terms.visits.strides[1]
        before, top = row + terms.visits.half, terms.visits.half - 1
        a, b = tl.load(before + tl.minimum(a, top)), tl.load(before + tl.minimum(b, top))
        c, d = tl.load(before + tl.minimum(c, top)), tl.load(before + tl.minimum(d, top))
    return row, a, b, c, d


@triton.jit
def is_visited(m0, n0, batch, head, terms, sizes, scalars, CONFIG: tl.constexpr):
    """Whether the tile at (m0, n0) is one that a walk along its queries would visit."""
    _start_q, len_q, _start_k, len_k, shift, _index = locate(terms, sizes, scalars, batch)
    first, end, holes = present_keys(terms, batch, len_k)
    end_m = tl.minimum(m0 + CONFIG.BLOCK_M, len_q)
    _low, _high, tile, _full, _past_full, past = visible_keys(
        m0, end_m, shift, first, end, holes, scalars, CONFIG
    )
    own, other = m0 // CONFIG.BLOCK_M, n0 // CONFIG.BLOCK_N
    only = (tl.maximum(tile, other), tl.minimum(past, other + 1), 0, 0)
    _list, a, b, _c, _d = walk(terms, batch, head, own, only)
    return a < b


@triton.jit
def tile_at(i, b, c, row, terms):
    """Number of the i-th tile of a walk, which goes on at c after b."""
    place = tl.where(i < b, i, i - b + c)
    if terms.visits is not None:
        place = tl.load(row + place)
    return place


@triton.jit
def head_of(view, batch, head):
    """Pointer to the first element of one head of one batch element."""
    return view.ptr + batch.to(tl.int64) * view.strides[0] + head.to(tl.int64) * view.strides[1]


@triton.jit
def elements_of(view, batch, head, origin, row, col):
    """Pointers to (row, col) of one head of one batch element.

    `origin` is the tile's first row and column: its place is a 64-bit scalar, what is within the
    tile takes 32 bits.
    """
    m0, n0 = origin
    stride_m, stride_n = view.strides[2], view.strides[3]
    base = head_of(view, batch, head) + m0.to(tl.int64) * stride_m + n0.to(tl.int64) * stride_n
    return base + ((row - m0) * stride_m + (col - n0) * stride_n)


@triton.jit
def load_rows(view, descriptor, batch, head, row0, last, ROWS: tl.constexpr, SIZE: tl.constexpr,
              BLOCK: tl.constexpr, INSIDE: tl.constexpr = False, col0=0):  # fmt: skip
    """Rows [row0, row0 + ROWS) of a head, row0 <= last, BLOCK columns; zero from SIZE on.

    Rows past `last` hold copies of it, or by descriptor anything; INSIDE: there are none. `col0`
    is the first column, a multiple of BLOCK; for no descriptor.
    """
    if descriptor is not None:
        tile = descriptor.load([batch.to(tl.int32), head, row0, 0])
        return tl.reshape(tile, [ROWS, BLOCK])
    stride_m, stride_d = view.strides[2], view.strides[3]
    # The tile's place is a 64-bit scalar; offsets within the tile stay the same all along a loop.
    base = head_of(view, batch, head) + row0.to(tl.int64) * stride_m
    row = tl.arange(0, ROWS)
    if not INSIDE:
        row = tl.minimum(row, tl.maximum(last - row0, 0))
    col = col0 + tl.arange(0, BLOCK)
    pointers = base + (row[:, None] * stride_m + col[None, :] * stride_d)
    if SIZE % BLOCK == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=col[None, :] < SIZE, other=0.0)


@triton.jit
def products(left, right, from_left, from_right, index, LEFT: tl.constexpr, RIGHT: tl.constexpr,
             SIZE: tl.constexpr, BLOCK: tl.constexpr, INSIDE: tl.constexpr,
             CONFIG: tl.constexpr):  # fmt: skip
    """Products of LEFT rows with RIGHT rows, (LEFT, RIGHT).

    Where rows are longer than CONFIG.CHUNK they are loaded again chunk by chunk from what
    `from_left` and `from_right` say, (view, head, first row, last row): three products of TF32
    take two registers a number, and long rows would not fit. INSIDE: of the right.
    """
    if BLOCK <= CONFIG.CHUNK:
        return tl.dot(left, tl.trans(right), input_precision=CONFIG.PRECISION)
    x, x_head, x_row, x_last = from_left
    y, y_head, y_row, y_last = from_right
    acc = tl.zeros([LEFT, RIGHT], tl.float32)
    for col0 in tl.range(0, SIZE, CONFIG.CHUNK, disable_licm=True):
        a = load_rows(x, None, index, x_head, x_row, x_last, LEFT, SIZE, CONFIG.CHUNK, False, col0)
        b = load_rows(y, None, index, y_head, y_row, y_last, RIGHT, SIZE, CONFIG.CHUNK, INSIDE,
                      col0)  # fmt: skip
        acc = tl.dot(a, tl.trans(b), acc, input_precision=CONFIG.PRECISION)
    return acc


@triton.jit
def store_rows(view, batch, head, row0, end, values, ROWS: tl.constexpr, SIZE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Write `values` to the rows [row0, min(row0 + ROWS, end)) and SIZE columns of a head."""
    row = row0 + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    base = head_of(view, batch, head) + row0.to(tl.int64) * view.strides[2]
    within = (row - row0)[:, None] * view.strides[2] + col[None, :] * view.strides[3]
    pointers = base + within
    inside = (row[:, None] < end) & (col[None, :] < SIZE)
    tl.store(pointers, values.to(view.ptr.dtype.element_ty), mask=inside)


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
def load_terms(origin, row, col, len_q, len_k, index, head, terms, INSIDE: tl.constexpr):
    """A tile of bias and bool mask; 0 for what is absent. INSIDE: all keys of the tile exist.

    To be called before the tile's q k^T. The compiler's choice of layouts depends on that order:
    loaded after it, these tiles pull the whole softmax out of the matrix unit's layout.
    """
    bias = 0.0
    keep = 0
    row = tl.minimum(row, len_q - 1)
    if terms.bias is not None:
        pointers = elements_of(terms.bias, index, head, origin, row, col)
        if INSIDE:
            bias = tl.load(pointers)
        else:
            bias = tl.load(pointers, mask=col < len_k, other=0.0)
    if terms.mask is not None:
        pointers = elements_of(terms.mask, index, head, origin, row, col)
        if INSIDE:
            keep = tl.load(pointers)
        else:
            keep = tl.load(pointers, mask=col < len_k, other=0)
    return bias, keep


@triton.jit
def score(qk, loaded, row, col, len_q, len_k, head, terms, scalars, CONFIG: tl.constexpr):
    """Score of `fused_attn.attention` from q k^T: (s, factor, slope of the softcap).

    `s * factor` is in base 2, factor > 0. A bias of -inf and the bool mask (`loaded`) hide already.
    """
    slope = 1.0
    if not CONFIG.MODIFIED:
        return qk, scalars.scale * LOG2E, slope
    bias, keep = loaded
    s = qk * scalars.scale
    if CONFIG.SOFTCAP:
        t = tanh(s / scalars.softcap)
        s = scalars.softcap * t
        slope = 1.0 - t * t
    if terms.alibi_slopes is not None:
        m = tl.load(terms.alibi_slopes.ptr + head * terms.alibi_slopes.strides[0])
        s -= m * tl.abs(row + len_k - len_q - col).to(tl.float32)
    if terms.bias is not None:
        bias = bias.to(tl.float32)
        s = tl.where(bias == -INFINITY, bias, s + tl.where(bias < LOWEST_BIAS, LOWEST_BIAS, bias))
    if terms.mask is not None:
        s = tl.where(keep != 0, s, -INFINITY)
    return s * LOG2E, 1.0, slope


@triton.jit
def keys_of_query(row, len_q, shift, first, end, scalars, CONFIG: tl.constexpr):
    """Keys [low, high) that a query may see by position; none for a row past the last."""
    low = row * 0 + first
    high = tl.where(row < len_q, end, 0)
    if CONFIG.BAND:
        low = tl.maximum(low, row + shift - scalars.left)
        high = tl.minimum(high, row + shift + scalars.right + 1)
    return low, high


@triton.jit
def queries_of_key(col, len_q, shift, first, end, index, terms, scalars, CONFIG: tl.constexpr):
    """Queries [low, high) that may see a key by position; none for a key that is not present."""
    present = (col >= first) & (col < end)
    if terms.padding is not None:
        present = present & (load_padding(col, present, index, terms) != 0)
    low = col * 0
    high = tl.where(present, len_q, 0)
    if CONFIG.BAND:
        low = tl.maximum(low, col - shift - scalars.right)
        high = tl.minimum(high, col - shift + scalars.left + 1)
    return low, high


@triton.jit
def load_padding(col, inside, index, terms):
    """The padding mask's bytes of some keys, 0 for those that are not `inside`."""
    strides = terms.padding.strides
    pointers = terms.padding.ptr + index * strides[0] + col.to(tl.int64) * strides[1]
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def hide(s, position, low, high):
    """`s`, -inf where `position` is outside [low, high)."""
    return tl.where((position >= low) & (position < high), s, -INFINITY)


@triton.jit
def hide_keys(s, col, low, high, len_k, index, terms):
    """`hide` by key position, and by the padding mask."""
    s = hide(s, col, low, high)
    if terms.padding is not None:
        s = tl.where(load_padding(col, col < len_k, index, terms) != 0, s, -INFINITY)
    return s


@triton.jit
def probability(s, factor, rows, index, head, start_q, row, len_q, sizes):
    """Softmax probabilities from scores; 0 in a row that sees no key."""
    at = (index * sizes.num_heads + head) * sizes.seqlen_q + start_q + tl.minimum(row, len_q - 1)
    lse2 = tl.load(rows.lse + at)
    if rows.weight is None:
        lse2 = lse2 * LOG2E
    p = tl.exp2(s * factor - tl.where(lse2 == -INFINITY, INFINITY, lse2))
    if rows.weight is not None:
        p = p * tl.load(rows.weight + at)
    return p


@triton.jit
def only_seen(tile, p, col, low, high, terms):
    """`tile` of K or V, zero where no query sees the key: it may hold NaN, and 0 * NaN is NaN.

    `p` are the probabilities, (queries, keys); keys outside [low, high) are not seen.
    """
    seen = (col >= low) & (col < high)
    if (terms.mask is not None) or (terms.bias is not None) or (terms.padding is not None):
        seen = seen & (tl.max(p, 0) > 0.0)
    return tl.where(seen[:, None], tile, tl.zeros_like(tile))


@triton.jit
def keep_mask(terms, scalars, row, col0, head, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities of a tile survive the dropout, one draw for four neighbouring keys.

    `row` is (BLOCK_M,), `head` is b * H + h. The counter is that of docs/design.md: every backend
    draws the same mask.
    """
    seed = tl.load(terms.rng)
    offset = tl.load(terms.rng + 1).to(tl.uint32)
    quad = (col0 // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    c2, c3 = zero + head.to(tl.uint32), zero + offset
    w0, w1, w2, w3 = tl.philox(
        seed, zero + quad[None, :], zero + row.to(tl.uint32)[:, None], c2, c3
    )
    limit = scalars.threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N])
