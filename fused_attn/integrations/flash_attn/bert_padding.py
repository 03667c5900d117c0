"""The functions of `flash_attn.bert_padding`: batches with padding to packed rows and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import checks

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(rows: Tensor, indices: Tensor) -> Tensor:
    """`rows[indices]`: (T, ...) and (n,) int64 to (n, ...); differentiable."""
    return rows[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(n, ...) put at `indices` of (first_axis_dim, ...), zero elsewhere; differentiable."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a batch that its mask keeps, one sequence after the other.

    Args:
        hidden_states: (B, L, ...).
        attention_mask: (B, L), 1 or True where a token is.
        unused_mask: (B, L), 1 where memory is kept although no token is there.

    Returns:
        rows (T, ...), their indices (T,) in the flattened batch, cu_seqlens (B + 1,) int32, the
        longest length, and the number of tokens of each sequence (B,) int32.

    Raises:
        ValueError: a mask has not the shape (B, L).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", kept)):
        checks.expect_shape(name, mask, tuple(hidden_states.shape[:2]), "(B, L)")
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten()).flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Rows (T, ...) back in their batch (batch, seqlen, ...), zero at padding; differentiable."""
    whole = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return whole.unflatten(0, (batch, seqlen))
