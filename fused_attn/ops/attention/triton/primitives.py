"""What the attention kernels are made of: operands, sequences, tiles of rows, products.

Index tensors come in shaped for broadcasting, `row` as (BLOCK_M, 1) and `col` as (1, BLOCK_N) or,
in a transposed tile, (1, BLOCK_M) and (BLOCK_N, 1): one text serves both. Row indices are clamped
to the tensor instead of masked: what a clamped index brings is hidden or not stored. Exponentials
are base 2, for which the hardware has an instruction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime.triton.rows import View

__all__ = ["View"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


# Rows of the copy of a padding mask are a multiple of this long, whatever the number of keys.
ROW_UNIT = tl.constexpr(16)

# Outer strides go by lengths, and Triton compiles a kernel anew where a number in a tuple is 1 or a
# multiple of 16: shifted, with a bit below, none is. From 2^23 on they take 64 bits so, and with
# them what is within a tile.
STRIDE_SHIFT = tl.constexpr(8)


def shifted(stride: int) -> int:
    """As `stride_of` takes it: neither 1 nor a multiple of 16."""
    return (stride << STRIDE_SHIFT.value) + 8


class ScoreView(NamedTuple):
    """A tensor with an element for each score, (B, H, Lq, Lk), as a kernel sees it."""

    ptr: Any
    strides: Any  # the outer three shifted, see `stride_of`; a broadcast dimension has stride 0
    last: Any = 1  # as that of View


class Terms(NamedTuple):
    """The optional operands of a call; None for an absent one."""

    bias: Any  # ScoreView
    mask: Any  # ScoreView, bytes
    padding: Any  # (B, Lk) bytes, rows as by `padding.stride`
    key_ranges: Any  # (B, 3) int32: first key of the padding mask, past the last, any hole between
    key_lengths: Any  # View (B,) int64
    alibi_slopes: Any  # View (H,)
    cu_seqlens_q: Any  # (B + 1,) int32
    cu_seqlens_k: Any
    rng: Any  # (2,) int64
    query_ids: Any  # (B, Lq) int32 or int64, dense: which document
    key_ids: Any  # (B, Lk)
    prefix_lengths: Any  # View (B,) int64
    pairs: Any = None  # PairViews, what functions of pairs load from
    visits: Any = None  # Visits by the tiles of the kernel
    classes: Any = None  # ClassLists by the tiles of the kernel; then there are no `visits`
    last: Any = None  # as that of View


class Visits(NamedTuple):
    """Of each own tile, the tiles of the other side that mask and documents show anything of.

    A row holds their numbers, ascending, and from `half` on how many come before each tile.
    """

    ptr: Any  # int32
    strides: Any  # of batch, head and own tile; 0 where the mask is broadcast
    half: Any


class ClassLists(NamedTuple):
    """Of each own tile, tiles of the other side: those that it sees wholly, then others.

    A row holds how many are seen wholly, how many there are in all, and their numbers.
    """

    ptr: Any  # int32
    strides: Any  # of batch, head and own tile; 0 where the mask is broadcast
    last: Any = 1  # as that of View


class RowStatistics(NamedTuple):
    """What recomputes each query's probabilities, p = exp2((score - anchor) * LOG2E - log).

    (B, H, Lq) each, dense; see `statistics.py`.
    """

    anchor: Any  # the row's largest score where lse is too coarse, else 0; in units of `score`
    log: Any  # of the sum of exponentials, base 2; inf where a query sees no key
    delta: Any  # rowsum(dout * out) + rowsum(dweights * weights) - dlse
    noisy: Any  # int8; at m0 // GRAIN whether a query near m0 has scores whose rounding is no noise


class Sizes(NamedTuple):
    """Sizes of a call; see `SCALARS`."""

    num_heads: Any
    group: Any  # query heads a key head
    seqlen_q: Any  # rows of the tensors: of all sequences together in a packed call
    seqlen_k: Any


class ScoreParams(NamedTuple):
    """The scalars of a score."""

    scale: Any
    softcap: Any
    left: Any  # a query sees `left` keys before its diagonal and `right` after it
    right: Any
    lower_right: Any  # 1: the diagonal ends in the last query and the last key; 0: starts in first
    threshold: Any  # dropout: a word is kept iff it is at least this (uint32 as int32)
    keep_scale: Any  # what a kept probability is multiplied by
    chunk: Any  # length of the chunks; 0 where CONFIG.CHUNKED is false


# Arguments of the kernels that none is specialised on. They come one by one: in a tuple Triton
# would specialise on each of them that is 1 or a multiple of 16.
SCALARS = [*Sizes._fields, *ScoreParams._fields]


class Sequence(NamedTuple):
    """One sequence of a call: a batch element, or a stretch of the rows of a packed call."""

    batch: Any  # its number
    index: Any  # along the batch dimension of the tensors, int64
    start_q: Any  # first row
    len_q: Any
    start_k: Any
    len_k: Any
    shift: Any  # key on the diagonal of query 0


@triton.jit
def stretch(cu_seqlens, batch, seqlen):
    """(first row, number of rows) of a sequence, never outside the tensor."""
    first = batch * 0
    length = first + seqlen
    if cu_seqlens is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), seqlen)
        length = tl.minimum(tl.load(cu_seqlens + batch + 1), seqlen) - first
    return first, tl.maximum(length, 0)


@triton.jit
def locate(terms, sizes, params, batch, CONFIG: tl.constexpr):
    """The `Sequence` of a number."""
    start_q, len_q = stretch(terms.cu_seqlens_q, batch, sizes.seqlen_q)
    start_k, len_k = stretch(terms.cu_seqlens_k, batch, sizes.seqlen_k)
    if CONFIG.ALIGNED:  # so that the compiler knows, and loads tiles of a bias 16 bytes at a time
        len_k = len_k // 16 * 16
    index = batch.to(tl.int64)
    if terms.cu_seqlens_q is not None:
        index = index * 0
    shift = (len_k - len_q) * params.lower_right
    return Sequence(batch, index, start_q, len_q, start_k, len_k, shift)


@triton.jit
def first_row(sequence, head, sizes):
    """Place of a head's first query in a dense (B, H, Lq) tensor."""
    return (sequence.index * sizes.num_heads + head) * sizes.seqlen_q + sequence.start_q


@triton.jit
def head_of(view, batch, head):
    """Pointer to the first element of one head of one batch element."""
    return view.ptr + batch.to(tl.int64) * view.strides[0] + head.to(tl.int64) * view.strides[1]


@triton.jit
def stride_of(view, dim: tl.constexpr, ALIGNED: tl.constexpr):
    """An outer stride of a `ScoreView`; ALIGNED: a multiple of 16, and the compiler knows it."""
    stride = view.strides[dim] >> STRIDE_SHIFT
    if ALIGNED:
        stride = stride // 16 * 16
    return stride


@triton.jit
def elements_of(view, batch, head, origin, row, col, ALIGNED: tl.constexpr):
    """Pointers to (row, col) of one head of one batch element of a `ScoreView`.

    `origin` is the tile's first row and column: its place is a 64-bit scalar, what is within the
    tile takes 32 bits.
    """
    m0, n0 = origin
    stride_m, stride_n = stride_of(view, 2, ALIGNED), view.strides[3]
    base = view.ptr + batch.to(tl.int64) * stride_of(view, 0, ALIGNED)
    base += head.to(tl.int64) * stride_of(view, 1, ALIGNED)
    base += m0.to(tl.int64) * stride_m + n0.to(tl.int64) * stride_n
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
def load_packed_rows(view, batch, head, row, SIZE: tl.constexpr, BLOCK: tl.constexpr, col0=0):
    """Rows of several heads, one of each in `head` and `row`; zero where `row` is negative."""
    col = col0 + tl.arange(0, BLOCK)
    pointers = head_of(view, batch, head) + row.to(tl.int64) * view.strides[2]
    pointers = pointers[:, None] + col[None, :] * view.strides[3]
    return tl.load(pointers, mask=(row >= 0)[:, None] & (col[None, :] < SIZE), other=0.0)


@triton.jit
def products(left, right, from_left, from_right, index, LEFT: tl.constexpr, RIGHT: tl.constexpr,
             SIZE: tl.constexpr, BLOCK: tl.constexpr, INSIDE: tl.constexpr,
             CONFIG: tl.constexpr):  # fmt: skip
    """Products of LEFT rows with RIGHT rows, (LEFT, RIGHT).

    Where rows are longer than CONFIG.CHUNK they are loaded again chunk by chunk from what
    `from_left` and `from_right` say, (view, head, first row, last row): three products of TF32
    take two registers a number, and long rows would not fit. Without a last row, `from_left` has a
    head and a row of its own for each, as `load_packed_rows` takes them. INSIDE: of the right.
    """
    if BLOCK <= CONFIG.CHUNK:
        return tl.dot(left, tl.trans(right), input_precision=CONFIG.PRECISION)
    x, x_head, x_row, x_last = from_left
    y, y_head, y_row, y_last = from_right
    acc = tl.zeros([LEFT, RIGHT], tl.float32)
    for col0 in tl.range(0, SIZE, CONFIG.CHUNK, disable_licm=True):
        if x_last is None:
            a = load_packed_rows(x, index, x_head, x_row, SIZE, CONFIG.CHUNK, col0)
        else:
            a = load_rows(x, None, index, x_head, x_row, x_last, LEFT, SIZE, CONFIG.CHUNK, False,
                          col0)  # fmt: skip
        b = load_rows(y, None, index, y_head, y_row, y_last, RIGHT, SIZE, CONFIG.CHUNK, INSIDE,
                      col0)  # fmt: skip
        acc = tl.dot(a, tl.trans(b), acc, input_precision=CONFIG.PRECISION)
    return acc


@triton.jit
def _load_column(place, index, column, ROWS: tl.constexpr):
    """One number of each row, float32; `place` as for `products`."""
    view, head, row0, last = place
    row = row0 + tl.minimum(tl.arange(0, ROWS), tl.maximum(last - row0, 0))
    pointers = head_of(view, index, head) + row.to(tl.int64) * view.strides[2]
    return tl.load(pointers + column * view.strides[3]).to(tl.float32)


@triton.jit
def products_in_order(from_left, from_right, index, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                      SIZE: tl.constexpr):  # fmt: skip
    """As `products`, added up column by column: the same bits in every tile of every kernel.

    Where scores are so large that their rounding decides who is seen, kernels agree by this alone.
    """
    acc = tl.zeros([LEFT, RIGHT], tl.float32)
    for column in tl.range(0, SIZE, num_stages=1):
        a = _load_column(from_left, index, column, LEFT)[:, None]
        b = _load_column(from_right, index, column, RIGHT)[None, :]
        acc = tl.fma(tl.broadcast_to(a, [LEFT, RIGHT]), tl.broadcast_to(b, [LEFT, RIGHT]), acc)
    return acc


@triton.jit
def row_products_in_order(from_left, from_right, index, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Products of rows of one side with those of the other one by one, as `products_in_order`."""
    acc = tl.zeros([ROWS], tl.float32)
    for column in tl.range(0, SIZE, num_stages=1):
        a = _load_column(from_left, index, column, ROWS)
        acc = tl.fma(a, _load_column(from_right, index, column, ROWS), acc)
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
