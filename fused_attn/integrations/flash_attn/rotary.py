"""Rotary positions as `flash_attn.layers.rotary` applies them (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import checks, overlap

__all__ = ["apply_rotary_emb"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with its first head numbers turned by the angles of their positions.

    In plain PyTorch, with c and s the rows of cos and sin at the positions::

        x1, x2 = x[..., :R // 2], x[..., R // 2 : R]     # or x[..., 0:R:2], x[..., 1:R:2]
        x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s

    Args:
        x: (B, L, H, D), or (T, H, D) with cu_seqlens.
        cos, sin: (S, R / 2), of the positions 0 ... S - 1; R <= D.
        interleaved: turn neighbours (GPT-J) in place of halves (GPT-NeoX).
        inplace: write into x; where x wants a gradient a new tensor is returned all the same.
        seqlen_offsets: position of the first row, a number or (B,) int.
        cu_seqlens: (N + 1,) int32; positions count from the start of each sequence.

    Raises:
        ValueError: shapes do not fit, or (on the CPU) a position lies outside of cos and sin.
    """
    rank, shape = (4, "(B, L, H, D)") if cu_seqlens is None else (3, "(T, H, D)")
    checks.expect_rank("x", x, rank, shape)
    checks.expect_shape("sin", sin, tuple(cos.shape), "that of `cos`")
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"`cos` must be (S, R / 2) with R <= {x.shape[-1]}, got R = {2 * half}")
    positions = positions_of(x, seqlen_offsets, cu_seqlens)
    turned = rotate(x, cos, sin, positions, interleaved)
    if inplace:
        overlap.expect_writable("x", x)
    if inplace and not (torch.is_grad_enabled() and x.requires_grad):
        return x.copy_(turned)
    return turned


def positions_of(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of x's rows: (1, L), (B, L), or (T,) of packed sequences."""
    if cu_seqlens is None:
        row = torch.arange(x.shape[1], device=x.device)
        return row + offsets[:, None] if isinstance(offsets, Tensor) else (row + offsets)[None]
    row = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    start = row - cu_seqlens[sequence]
    return start + (offsets[sequence] if isinstance(offsets, Tensor) else offsets)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) turned at positions (...,); computed in float32, in x's dtype."""
    if positions.numel() and positions.device.type == "cpu":
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"`cos` must reach the positions {low} to {high}, got {cos.shape[0]} rows"
            )
    width = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[positions][..., None, :].to(dtype) for table in (cos, sin))
    wide = x[..., :width].to(dtype)
    if interleaved:
        x1, x2 = wide[..., ::2], wide[..., 1::2]
        turned = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).flatten(-2)
    else:
        x1, x2 = wide.chunk(2, dim=-1)
        turned = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., width:]), dim=-1)
