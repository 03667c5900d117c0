"""Gradient of what goes by the distance of query and key: sums along the diagonals of the scores.

One program owns a diagonal of tiles of one head and goes along it in order. A tile adds to the
distances of two neighbouring diagonals; each program leaves both halves, and they are joined after
the launch. No atomic additions, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bias_gradient import gradient_of_tile
from .primitives import SCALARS, ScoreParams, Sizes, locate
from .visibility import is_visited


@triton.jit
def _along_diagonals(tile, first, BLOCK: tl.constexpr):
    """Sums of a square tile over its rows; the number d of row i stands in column i + first - d."""
    i, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    col = i + first - d
    inside = (col >= 0) & (col < BLOCK)
    moved = tl.gather(tile, tl.where(inside, col, 0), 1)
    return tl.sum(tl.where(inside, moved, 0.0), 0)


@triton.jit(do_not_specialize=[*SCALARS, "tiles_m", "tiles_n"])
def _attention_distance_gradient_kernel(
    q, k, v, dout, statistics, partial, tiles_m, tiles_n, terms, num_heads, group, seqlen_q,
    seqlen_k, scale, softcap, left, right, lower_right, threshold, keep_scale, chunk,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Both halves of one diagonal of tiles, (B, H, tiles_m + tiles_n - 1, 2, BLOCK) in all.

    The first half holds the distances below those of the second; see `launch`.
    """
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    BLOCK: tl.constexpr = CONFIG.BLOCK_N
    diagonals = tiles_m + tiles_n - 1
    diagonal, plane = tl.program_id(0) % diagonals, tl.program_id(0) // diagonals
    sequence, head = locate(terms, sizes, params, plane // num_heads, CONFIG), plane % num_heads
    below = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    apart = diagonal - (tiles_n - 1)  # tile of queries - tile of keys
    first, end = tl.maximum(-apart, 0), tl.minimum(tiles_n, tiles_m - apart)
    for n in tl.range(first, end):
        m0 = (n + apart) * BLOCK
        n0 = m0 - apart * BLOCK
        if is_visited(m0, n0, head, sequence, terms, params, CONFIG):
            tile = gradient_of_tile(q, k, v, dout, statistics, None, m0, n0, sequence, head, terms,
                                    sizes, params, CONFIG)  # fmt: skip
            below += _along_diagonals(tile, BLOCK - 1, BLOCK)
            above += _along_diagonals(tile, -1, BLOCK)
    target = partial + tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, BLOCK)
    tl.store(target, below)
    tl.store(target + BLOCK, above)
