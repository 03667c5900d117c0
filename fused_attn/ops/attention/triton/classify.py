"""Which tiles functions of pairs show wholly, in part or not at all: looked at beforehand.

The mask is computed once for all pairs, a tile at a time, and only its classes are stored, for
each cell of GRAIN x GRAIN (`classes.py`). What belongs to the mask counts, whether it is code or an
operand; what a list of blocks says is taken from it. The map and its lists are kept with the
functions (`PairFunctions.memory`), so that calls with an equal mask share them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ....runtime.triton import device as triton_device
from ..functions import PairFunctions
from ..problem import Operands, Options
from . import config
from .classes import ClassMap
from .function_source import loads_of
from .function_terms import block_classes, pairs_of
from .launcher import Launcher
from .primitives import INFINITY, SCALARS, ScoreParams, Sizes, locate
from .scores import hide, load_terms, score
from .tiles import AttentionTile
from .visibility import keys_of_query, present_keys
from .visits import GRAIN, Cells, own_sizes

_TILE = AttentionTile(64, 64, 4, 1)  # that a program looks at
_BY_BATCH = ("key_padding_mask", "key_lengths", "query_documents", "prefix_lengths")


@triton.jit(do_not_specialize=["num_planes_heads", *SCALARS])
def _attention_classes_kernel(
    classes, num_planes_heads, terms, num_heads, group, seqlen_q, seqlen_k, scale, softcap, left,
    right, lower_right, threshold, keep_scale, chunk, GRAIN: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Classes of the cells of one tile, by the score that its mask makes of 0."""
    sizes = Sizes(num_heads, group, seqlen_q, seqlen_k)
    params = ScoreParams(scale, softcap, left, right, lower_right, threshold, keep_scale, chunk)
    ROWS: tl.constexpr = CONFIG.BLOCK_M // GRAIN
    COLS: tl.constexpr = CONFIG.BLOCK_N // GRAIN
    across, down = tl.cdiv(seqlen_k, CONFIG.BLOCK_N), tl.cdiv(seqlen_q, CONFIG.BLOCK_M)
    n, rest = tl.program_id(0) % across, tl.program_id(0) // across
    m, plane = rest % down, rest // down
    batch, head = plane // num_planes_heads, plane % num_planes_heads
    m0, n0 = m * CONFIG.BLOCK_M, n * CONFIG.BLOCK_N
    sequence = locate(terms, sizes, params, batch, CONFIG)
    first, end, _holes = present_keys(terms, sequence.batch, sequence.len_k)
    row = (m0 + tl.arange(0, CONFIG.BLOCK_M))[:, None]
    col = (n0 + tl.arange(0, CONFIG.BLOCK_N))[None, :]
    bounds = keys_of_query(row, sequence, first, end, params, CONFIG)
    loaded = load_terms(m0, n0, row, col, sequence, head, terms, sizes, False, CONFIG)
    s = tl.zeros([CONFIG.BLOCK_M, CONFIG.BLOCK_N], tl.float32)
    s, _scale, _slope = score(s, loaded, m0, n0, row, col, sequence, head, terms, params, False,
                              CONFIG)  # fmt: skip
    s = hide(s, row, col, bounds, sequence, terms, sizes, params, False, CONFIG)
    s = tl.reshape(s, [ROWS, GRAIN, COLS, GRAIN])
    shown = (s != -INFINITY).to(tl.int32)  # NaN has to show: an index left its table
    seen = tl.max(tl.max(shown, 3), 1) + tl.min(tl.min((s == 0.0).to(tl.int32), 3), 1)
    rows, cols = tl.cdiv(seqlen_q, GRAIN), tl.cdiv(seqlen_k, GRAIN)
    i, j = m * ROWS + tl.arange(0, ROWS)[:, None], n * COLS + tl.arange(0, COLS)[None, :]
    target = classes + (plane.to(tl.int64) * rows + i) * cols + j
    tl.store(target, seen.to(tl.uint8), mask=(i < rows) & (j < cols))


def classify(
    launcher: Launcher, operands: Operands, options: Options, functions: PairFunctions
) -> None:
    """Give the launcher the classes of its tiles, where there is a mask and it pays."""
    plan = launcher.plan
    if functions.mask is None and functions.kinds is None:
        return
    scores = plan.batch * plan.num_heads * plan.seqlen_q * plan.seqlen_k
    if not config.classes_pay(plan.problem, scores, launcher.products):
        return
    memory = {} if functions.memory is None else functions.memory
    if "classes" not in memory:
        memory["classes"] = ClassMap(*_looked_at(operands, options, functions))
    launcher.classes = memory["classes"]


def _looked_at(operands: Operands, options: Options, functions: PairFunctions) -> Cells:
    lengths = (operands.q.shape[2], operands.k.shape[2])
    if functions.kinds is not None:
        return block_classes(functions.kinds, functions.block, *lengths)
    # The mask alone: a change of scores that hides shows in its score.
    pairs = pairs_of(functions._replace(score=None), operands.q)
    launcher = Launcher(operands, options, 0, pairs=pairs)
    batch, heads = _planes(operands, functions)
    whole = (triton.cdiv(lengths[0], GRAIN), triton.cdiv(lengths[1], GRAIN))
    cells = torch.empty((batch, heads, *whole), dtype=torch.uint8, device=operands.q.device)
    tiles = math.prod(map(triton.cdiv, lengths, (_TILE.block_m, _TILE.block_n)))
    triton_device.launch(
        _attention_classes_kernel,
        tiles * batch * heads,
        *(cells, heads, launcher.terms, *launcher.plan.scalars, GRAIN, launcher.config(_TILE)),
        warps=_TILE.warps,
        stages=_TILE.stages,
    )
    return Cells(cells, whole)


def _planes(operands: Operands, functions: PairFunctions) -> tuple[int, int]:
    """Batch elements and heads between which the mask may differ; 1 where it does not."""
    of_mask = (1, 1) if operands.mask is None else own_sizes(operands.mask)
    by_batch = any(getattr(operands, name) is not None for name in _BY_BATCH) or of_mask[0] > 1
    by_head = of_mask[1] > 1
    for load in loads_of(functions.mask):
        leaf = functions.leaves[load.leaf]
        vector = leaf.place != "table"
        by_batch |= leaf.name == "b" or (vector and leaf.tensor.shape[0] > 1)
        by_head |= leaf.name == "h" or (vector and leaf.tensor.shape[1] > 1)
    batch, heads = operands.q.shape[:2]
    return batch if by_batch else 1, heads if by_head else 1
