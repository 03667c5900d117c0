"""Who sees whom by position, and which tiles a kernel visits."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import ROW_UNIT


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
def chunk_of(position, params):
    """floor(position / chunk); positions of queries may be below 0."""
    below = (params.chunk - 1 - position) // params.chunk
    return tl.where(position >= 0, position // params.chunk, -below)


@triton.jit
def prefix_of(sequence, terms):
    """How many keys are exempt from the band: 0 without a prefix."""
    prefix = sequence.len_k * 0
    if terms.prefix_lengths is not None:
        stride = terms.prefix_lengths.strides[0]
        length = tl.load(terms.prefix_lengths.ptr + sequence.batch.to(tl.int64) * stride)
        prefix = tl.minimum(tl.maximum(length, 0), sequence.len_k.to(tl.int64)).to(tl.int32)
    return prefix


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
def visible_keys(m0, sequence, terms, params, CONFIG: tl.constexpr):
    """What a query of the BLOCK_M from m0 on sees: ((low, high, first, end), `split_tiles`).

    By position and length keys in [low, high); [first, end) are present.
    """
    first, end, holes = present_keys(terms, sequence.batch, sequence.len_k)
    low, high, full_low, full_high = first, end, first, tl.where(holes != 0, 0, end)
    first_p = m0 + sequence.shift
    last_p = tl.minimum(m0 + CONFIG.BLOCK_M, sequence.len_q) - 1 + sequence.shift
    if CONFIG.BAND:
        band_low, band_high = first_p - params.left, last_p + params.right + 1
        band_full_low, band_full_high = last_p - params.left, first_p + params.right + 1
        if terms.prefix_lengths is not None:
            prefix = prefix_of(sequence, terms)
            band_low = tl.where(prefix > 0, 0, band_low)
            band_high = tl.maximum(band_high, prefix)
            # What all see in the prefix and what all see in the band may lie apart: then one of it.
            joined = (band_full_low <= prefix) | (band_full_high <= band_full_low)
            band_full_high = tl.where(
                joined & (prefix > 0),
                tl.maximum(prefix, tl.where(band_full_low <= prefix, band_full_high, 0)),
                band_full_high,
            )
            band_full_low = tl.where(joined & (prefix > 0), 0, band_full_low)
        low, high = tl.maximum(low, band_low), tl.minimum(high, band_high)
        full_low = tl.maximum(full_low, band_full_low)
        full_high = tl.minimum(full_high, band_full_high)
    if CONFIG.CHUNKED:
        first_chunk, last_chunk = chunk_of(first_p, params), chunk_of(last_p, params)
        low = tl.maximum(low, first_chunk * params.chunk)
        high = tl.minimum(high, (last_chunk + 1) * params.chunk)
        full_low = tl.maximum(full_low, last_chunk * params.chunk)
        full_high = tl.minimum(full_high, (first_chunk + 1) * params.chunk)
    high = tl.maximum(high, low)
    tiles = split_tiles(low, high, full_low, full_high, CONFIG.BLOCK_N)
    return (low, high, first, end), tiles


@triton.jit
def visible_queries(n0, sequence, terms, sizes, params, BOUNDED: tl.constexpr,
                    CONFIG: tl.constexpr):  # fmt: skip
    """As `visible_keys`, for the queries that see a key of the BLOCK_N from n0 on.

    The first two bounds are those of each key, (BLOCK_N, 1). BOUNDED: no tile is full in which
    there are keys past the last, because some operand ends there.
    """
    first, end, holes = present_keys(terms, sequence.batch, sequence.len_k)
    low_n, past_n = tl.maximum(n0, first), n0 + CONFIG.BLOCK_N
    end_n = tl.minimum(past_n, end)
    whole = (holes == 0) & (n0 >= first)
    if BOUNDED:
        whole = whole & (past_n <= end)
    else:  # keys past the last count as seen: nothing of them is stored
        whole = whole & ((past_n <= end) | (end == sequence.len_k))
    low, high = sequence.len_q * 0, sequence.len_q
    full_low, full_high = low, tl.where(whole, high, 0)
    if CONFIG.BAND:
        band_low = low_n - sequence.shift - params.right
        band_high = end_n - sequence.shift + params.left
        band_full_low = end_n - 1 - sequence.shift - params.right
        band_full_high = low_n - sequence.shift + params.left + 1
        if terms.prefix_lengths is not None:
            prefix = prefix_of(sequence, terms)
            band_low = tl.where(low_n < prefix, 0, band_low)
            band_high = tl.where(low_n < prefix, high, band_high)
            band_full_low = tl.where(end_n <= prefix, 0, band_full_low)
            band_full_high = tl.where(end_n <= prefix, high, band_full_high)
        low, high = tl.maximum(low, band_low), tl.minimum(high, band_high)
        full_low = tl.maximum(full_low, band_full_low)
        full_high = tl.minimum(full_high, band_full_high)
    if CONFIG.CHUNKED:
        first_chunk, last_chunk = low_n // params.chunk, (end_n - 1) // params.chunk
        low = tl.maximum(low, first_chunk * params.chunk - sequence.shift)
        high = tl.minimum(high, (last_chunk + 1) * params.chunk - sequence.shift)
        full_low = tl.maximum(full_low, last_chunk * params.chunk - sequence.shift)
        full_high = tl.minimum(full_high, (first_chunk + 1) * params.chunk - sequence.shift)
    high = tl.where(end_n > low_n, tl.maximum(high, low), low)
    tiles = split_tiles(low, high, full_low, full_high, CONFIG.BLOCK_M)
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[:, None]
    return queries_of_key(col, sequence, first, end, terms, sizes, params, CONFIG), tiles


@triton.jit
def keys_of_query(row, sequence, first, end, params, CONFIG: tl.constexpr):
    """Keys [low, high) that a query may see by position; none for a row past the last.

    But for a prefix, see `scores.hide`.
    """
    low = row * 0 + first
    high = tl.where(row < sequence.len_q, end, 0)
    if CONFIG.BAND:
        low = tl.maximum(low, row + sequence.shift - params.left)
        high = tl.minimum(high, row + sequence.shift + params.right + 1)
    if CONFIG.CHUNKED:
        start = chunk_of(row + sequence.shift, params) * params.chunk
        low, high = tl.maximum(low, start), tl.minimum(high, start + params.chunk)
    return low, high


@triton.jit
def queries_of_key(col, sequence, first, end, terms, sizes, params, CONFIG: tl.constexpr):
    """Queries [low, high) that may see a key by position; none for a key that is not present."""
    present = (col >= first) & (col < end)
    if terms.padding is not None:
        present = present & (load_padding(col, present, sequence.index, terms, sizes) != 0)
    low = col * 0
    high = tl.where(present, sequence.len_q, 0)
    if CONFIG.BAND:
        banded_low = tl.maximum(low, col - sequence.shift - params.right)
        banded_high = tl.minimum(high, col - sequence.shift + params.left + 1)
        if terms.prefix_lengths is not None:
            prefix = prefix_of(sequence, terms)
            banded_low = tl.where(col < prefix, low, banded_low)
            banded_high = tl.where(col < prefix, high, banded_high)
        low, high = banded_low, banded_high
    if CONFIG.CHUNKED:
        start = col // params.chunk * params.chunk - sequence.shift
        low, high = tl.maximum(low, start), tl.minimum(high, start + params.chunk)
    return low, high


@triton.jit
def load_padding(col, inside, index, terms, sizes):
    """The padding mask's bytes of some keys, 0 for those that are not `inside`."""
    row = terms.padding + index * (tl.cdiv(sizes.seqlen_k, ROW_UNIT) * ROW_UNIT)
    return tl.load(row + col, mask=inside, other=0)


@triton.jit
def walk(terms, sequence, head, own, tiles, MASKED: tl.constexpr = True):
    """How to visit the tiles [a, b) and [c, d): (list, a, b, c, d), for `tile_at`.

    Where there are lists (`visits.py`), a to d become places in that of the tile `own`. Where tiles
    are classified (`classes.py`) the classes alone count: what is seen in part if MASKED, or else
    what is seen wholly.
    """
    a, b, c, d = tiles
    visited = own
    if terms.visits is not None:
        visited = terms.visits.ptr + own * terms.visits.strides[2]
        visited += sequence.batch.to(tl.int64) * terms.visits.strides[0]
        visited += head * terms.visits.strides[1]
        before, top = visited + terms.visits.half, terms.visits.half - 1
        a, b = tl.load(before + tl.minimum(a, top)), tl.load(before + tl.minimum(b, top))
        c, d = tl.load(before + tl.minimum(c, top)), tl.load(before + tl.minimum(d, top))
    if terms.classes is not None:
        visited = terms.classes.ptr + own * terms.classes.strides[2]
        visited += sequence.batch.to(tl.int64) * terms.classes.strides[0]
        visited += head * terms.classes.strides[1]
        a, b = tl.load(visited), tl.load(visited + 1)
        if not MASKED:
            a, b = a * 0, a
        visited += 2
        c, d = a * 0, a * 0
    return visited, a, b, c, d


@triton.jit
def is_visited(m0, n0, head, sequence, terms, params, CONFIG: tl.constexpr):
    """Whether the tile at (m0, n0) is one that a walk along its queries would visit."""
    _bounds, tiles = visible_keys(m0, sequence, terms, params, CONFIG)
    own, other = m0 // CONFIG.BLOCK_M, n0 // CONFIG.BLOCK_N
    only = (tl.maximum(tiles[0], other), tl.minimum(tiles[3], other + 1), 0, 0)
    _list, a, b, _c, _d = walk(terms, sequence, head, own, only)
    return a < b


@triton.jit
def tile_at(i, b, c, visited, terms):
    """Number of the i-th tile of a walk, which goes on at c after b."""
    place = tl.where(i < b, i, i - b + c)
    if (terms.visits is not None) or (terms.classes is not None):
        place = tl.load(visited + place)
    return place
