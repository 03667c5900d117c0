"""Functions of pairs as the kernels take them: their code, what it loads, what lists hide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..functions import PairFunctions, Value
from . import config
from .function_source import Helpers, helpers
from .primitives import shifted
from .tiles import AttentionTile
from .visits import GRAIN, Cells


class LeafView(NamedTuple):
    """A vector or a table as the helpers see it."""

    ptr: Any
    strides: Any  # shifted, see `primitives.stride_of`; 0 where a vector is broadcast
    sizes: Any  # of a table, shifted
    last: Any = 1  # as that of View


class KindsView(NamedTuple):
    """What the list of blocks says."""

    ptr: Any  # uint8
    strides: Any  # shifted
    block: Any  # queries and keys of a block, shifted
    last: Any = 1


class PairViews(NamedTuple):
    """All that the helpers load from."""

    leaves: Any  # LeafView, or None of what is not loaded
    kinds: Any  # KindsView or None
    last: Any = None


class Pairs(NamedTuple):
    """The functions of one launch.

    Attributes:
        key: what decides the kernel's constants.
    """

    key: Helpers
    views: PairViews
    functions: PairFunctions

    def is_uniform(self, tile: AttentionTile, decoding: bool) -> bool:
        """Whether no tile lies across two blocks of the list."""
        block_q, block_k = self.functions.block
        return block_q % tile.block_m == 0 and block_k % tile.block_n == 0 and not decoding

    def lists_pay(self, problem: config.ProblemClass, scores: int, products: float) -> bool:
        """Whether there is a list of blocks, and tiles that it hides are better not visited."""
        kinds = self.functions.kinds
        return kinds is not None and config.lists_pay(problem, kinds.numel(), scores, products)

    def cells(self, seqlen_q: int, seqlen_k: int) -> Cells:
        """The map of what the list of blocks shows."""
        assert self.functions.kinds is not None
        return block_cells(self.functions.kinds, self.functions.block, seqlen_q, seqlen_k)

    def lists_are_shared(self) -> bool:
        """Whether all heads have the same list of blocks."""
        return self.functions.kinds is None or self.functions.kinds.shape[1] == 1


def pairs_of(functions: PairFunctions, like: Tensor, slope: Value | None = None) -> Pairs:
    """The functions with the derivative that a pass calls for; `like` is q."""
    leaves = [None if leaf.name else _leaf(leaf, like.device) for leaf in functions.leaves]
    kinds = None
    if functions.kinds is not None:
        tensor = functions.kinds.to(torch.uint8).contiguous()
        kinds = KindsView(tensor, _outer(tensor)[:3], tuple(map(shifted, functions.block)))
    return Pairs(helpers(functions, slope), PairViews(tuple(leaves) or (None,), kinds), functions)


def _leaf(leaf: Any, device: torch.device) -> LeafView:
    tensor = leaf.tensor.to(device)
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    if leaf.place != "table":
        return LeafView(tensor, _outer(tensor)[:2], (0,))
    return LeafView(tensor, tuple(map(shifted, tensor.stride())), tuple(map(shifted, tensor.shape)))


def _outer(tensor: Tensor) -> tuple[int, ...]:
    """Strides; 0 of what is broadcast."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(shifted(0 if size == 1 else stride) for size, stride in sizes)


def table_indices(load: Value, leaves: Sequence[Any]) -> list[str] | None:
    """Names of the inputs that index a table; None where they are not just those, each once.

    Then every number of the table belongs to one query and key of a head, at most.
    """
    names = [leaves[x.leaf].name if x.leaf >= 0 else "" for x in load.args]
    plain = all(x.operation.startswith("load_") for x in load.args)
    apart = len(set(names)) == len(names) and {"q_idx", "kv_idx"} <= set(names)
    return names if plain and apart and "" not in names else None


def block_cells(kinds: Tensor, block: tuple[int, int], seqlen_q: int, seqlen_k: int) -> Cells:
    """The map of what lists of blocks show anything of."""
    shown = kinds != 0
    whole = (triton.cdiv(seqlen_q, GRAIN), triton.cdiv(seqlen_k, GRAIN))
    for dim, (size, cells) in enumerate(zip(block, whole, strict=True), start=2):
        shown = _stretched(shown, dim, size, cells)
    return Cells(shown.to(torch.uint8).contiguous(), whole)


def block_classes(kinds: Tensor, block: tuple[int, int], seqlen_q: int, seqlen_k: int) -> Cells:
    """As `block_cells`, 2 in place of 1 where all of a cell is shown by the list alone."""
    cells, whole = block_cells(kinds, block, seqlen_q, seqlen_k)
    hides = block_cells(kinds != 2, block, seqlen_q, seqlen_k).cells
    full = cells & (1 - hides)
    for dim, length in ((2, seqlen_q), (3, seqlen_k)):  # what ends within a cell is not all there
        if length % GRAIN:
            full.select(dim, -1).zero_()
    return Cells(cells + full, whole)


def _stretched(shown: Tensor, dim: int, block: int, cells: int) -> Tensor:
    """Along one dimension, cells of GRAIN in place of blocks."""
    if block % GRAIN == 0:
        number = torch.arange(cells, device=shown.device) // (block // GRAIN)
        return shown.index_select(dim, number)
    first = torch.arange(cells, device=shown.device) * GRAIN
    last = ((first + GRAIN - 1) // block).clamp(max=shown.shape[dim] - 1)
    before = torch.nn.functional.pad(shown.long().cumsum(dim), _front(shown.dim() - 1 - dim))
    count = before.index_select(dim, last + 1) - before.index_select(dim, first // block)
    return count > 0


def _front(behind: int) -> Sequence[int]:
    """Padding by one number in front of the dimension that has so many behind it."""
    return [0] * (2 * behind) + [1, 0]
