"""Whether a BlockMask's lists say what its mask function says."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .blocks import ALL, NOTHING, kinds_of, rows_of
from .expression import Expression

_answers: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], bool]] = weakref.WeakKeyDictionary()


def agrees(block_mask: Any, mask: Expression | None, q: Tensor, k: Tensor) -> bool:
    """True where the function alone decides: a list hides nothing that it shows, and shows nothing
    that it hides. Looked at once for a BlockMask.
    """
    if block_mask is None or not hasattr(block_mask, "kv_num_blocks"):
        return True
    sizes = (*q.shape[:3], k.shape[2])
    answers = _answers.setdefault(block_mask, {})
    if sizes not in answers:
        answers[sizes] = _look(block_mask, mask, sizes, q.device)
    return answers[sizes]


def _look(
    block_mask: Any, mask: Expression | None, sizes: tuple[int, ...], device: torch.device
) -> bool:
    kinds = kinds_of(block_mask)
    if mask is None:
        return bool((kinds != NOTHING).all())
    batch, heads, seqlen_q, seqlen_k = sizes
    block_q, block_k = block_mask.BLOCK_SIZE
    inputs = {
        "b": torch.arange(batch, device=device)[:, None, None, None],
        "h": torch.arange(heads, device=device)[:, None, None],
        "kv_idx": torch.arange(seqlen_k, device=device)[None, :],
    }
    number = torch.arange(seqlen_k, device=device) // block_k
    for row in rows_of(None, seqlen_q, seqlen_k, block_q):
        inputs["q_idx"] = torch.arange(row.queries.start, row.queries.stop, device=device)[:, None]
        visible = mask.evaluate(inputs, mask.captured)
        visible = visible[(None,) * (4 - visible.dim())]
        mine = kinds[:, :, row.queries.start // block_q][:, :, number][:, :, None]
        shown = (mine == ALL) | (visible & (mine != NOTHING))
        if not torch.equal(*torch.broadcast_tensors(shown, visible)):
            return False
    return True
