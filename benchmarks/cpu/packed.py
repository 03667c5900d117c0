"""Packed sequences against torch on the same sequences, padded."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fused_attn
from fused_attn.testing import assert_within_budget

from .row import BF16, FP32, SHORT_NAMES, Row, Side, check

HEADS, HEAD_DIM = 8, 64


def _build(dtype: torch.dtype, batch: int, length: int) -> dict[str, Side]:
    # Lengths spread evenly, two thirds of the longest on average.
    lengths = (torch.linspace(1 / 3, 1.0, batch) * length).round().long()
    visible = torch.arange(length) < lengths[:, None]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = torch.randn(3, int(lengths.sum()), HEADS, HEAD_DIM).to(dtype)
    padded = torch.zeros(3, batch, length, HEADS, HEAD_DIM, dtype=dtype)
    padded[:, visible] = tokens
    q, k, v = tokens
    pq, pk, pv = padded.transpose(2, 3)
    mask = visible[:, None, None, :]

    def ours() -> torch.Tensor:
        return fused_attn.attention_varlen(q, k, v, starts, starts, length, length)

    def theirs() -> torch.Tensor:
        return sdpa(pq, pk, pv, attn_mask=mask)

    def compare() -> None:
        exact = sdpa(pq.double(), pk.double(), pv.double(), attn_mask=mask)
        plain = theirs().transpose(1, 2)[visible]
        assert_within_budget("out", ours(), plain, exact.transpose(1, 2)[visible])

    return {"ours": Side(ours, check(compare)), "padded sdpa": Side(theirs)}


def rows() -> list[Row]:
    result = []
    for dtype, gate, goal in ((FP32, 1.5, 2.0), (BF16, 3.0, 4.0)):
        for batch, length in ((8, 512), (32, 128)):
            name = f"{SHORT_NAMES[dtype]} packed {batch}x{HEADS}x{length}x{HEAD_DIM}"
            flops = (
                4.0
                * HEADS
                * HEAD_DIM
                * sum((length * (1 / 3 + 2 / 3 * i / (batch - 1))) ** 2 for i in range(batch))
            )
            result.append(
                Row(name, gate, goal, dtype, lambda d=dtype, b=batch, n=length: _build(d, b, n),
                    flops)
            )  # fmt: skip
    return result
