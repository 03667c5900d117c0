"""Which keys each block of queries looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NOTHING, SOME, ALL = 0, 1, 2  # of a block, what is seen


@dataclass
class Row:
    """A block of queries and the keys that some of them may see.

    Attributes:
        queries: the rows of q.
        keys: a slice, or the numbers (n,) of keys that lie apart.
        kinds: (Bm, Hm, 1, n) of the keys' blocks: NOTHING, SOME (the mask function decides) or ALL;
            None: the mask function decides everywhere, and where there is none all is seen.
    """

    queries: slice
    keys: slice | Tensor
    kinds: Tensor | None

    def key_numbers(self, device: torch.device) -> Tensor:
        if isinstance(self.keys, slice):
            return torch.arange(self.keys.start, self.keys.stop, device=device)
        return self.keys

    def of(self, x: Tensor) -> Tensor:
        """The keys (B, H, n, D) of x (B, H, L, D); a view where they lie together."""
        return x[:, :, self.keys] if isinstance(self.keys, slice) else x.index_select(2, self.keys)


def kinds_of(block_mask: Any) -> Tensor:
    """(Bm, Hm, blocks of queries, blocks of keys) int8: what each block's list says of it."""
    kinds = _marked(block_mask.kv_num_blocks, block_mask.kv_indices) * SOME
    if block_mask.full_kv_num_blocks is not None:
        full = _marked(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        kinds = torch.where(full.bool(), ALL, kinds)
    return kinds.to(torch.int8)


def listed(block_mask: Any) -> tuple[Tensor | None, tuple[int, int]]:
    """What a BlockMask's lists say of each block, and the blocks' size."""
    if block_mask is None or not hasattr(block_mask, "kv_num_blocks"):
        return None, (1, 1)
    size_q, size_k = block_mask.BLOCK_SIZE
    return kinds_of(block_mask).to(torch.int32).contiguous(), (size_q, size_k)


def _marked(number: Tensor, indices: Tensor) -> Tensor:
    """1 where one of the first `number` of a row's indices points to."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
    # Numbers past the end of a list may be anything: one column more takes them.
    place = torch.where(listed, indices.long(), indices.shape[-1])
    marks = torch.zeros((*indices.shape[:-1], indices.shape[-1] + 1), device=indices.device)
    return marks.scatter(-1, place, 1.0)[..., :-1].to(torch.int8)


def rows_of(block_mask: Any, seqlen_q: int, seqlen_k: int, size_q: int = 128) -> list[Row]:
    """The blocks of queries; without a block mask each looks at all keys."""
    if block_mask is None or not hasattr(block_mask, "kv_num_blocks"):
        starts = range(0, seqlen_q, size_q)
        every = slice(0, seqlen_k)
        return [Row(slice(s, min(s + size_q, seqlen_q)), every, None) for s in starts]
    kinds = kinds_of(block_mask)
    block_q, block_k = block_mask.BLOCK_SIZE
    rows = []
    for start in range(0, seqlen_q, min(block_q, size_q)):
        stop = min(start + min(block_q, size_q), seqlen_q)
        mine = kinds[:, :, start // block_q]  # (Bm, Hm, blocks of keys)
        wanted = mine.amax(dim=(0, 1)).nonzero()[:, 0].tolist()
        keys = _keys_of(wanted, block_k, seqlen_k, kinds.device)
        number = torch.arange(seqlen_k, device=kinds.device)[keys]
        chosen = mine[:, :, number // block_k][:, :, None]
        rows.append(Row(slice(start, stop), keys, None if bool((chosen == SOME).all()) else chosen))
    return rows


def _keys_of(blocks: list[int], size: int, length: int, device: torch.device) -> slice | Tensor:
    if not blocks:
        return slice(0, 0)
    if blocks == list(range(blocks[0], blocks[-1] + 1)):
        return slice(min(blocks[0] * size, length), min((blocks[-1] + 1) * size, length))
    pieces = [torch.arange(b * size, min((b + 1) * size, length), device=device) for b in blocks]
    return torch.cat(pieces)
