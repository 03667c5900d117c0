"""Sums over many products are made of parts, so that their rounding errors stay small."""

from __future__ import annotations

import pytest
import torch

from fused_attn import attention
from fused_attn.runtime import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")


@pytest.mark.parametrize("head_dim", [200, 256, 320, 512])
def test_deep_heads_are_as_exact_as_plain_ones_on_average(head_dim: int) -> None:
    """One chain of 256 additions had twice the error of plain PyTorch, which adds in parts."""
    mine, plain = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 2, n, head_dim, generator=generator) for n in (129, 257, 257))
        exact = attention(q.double(), k.double(), v.double(), backend="reference")
        for errors, backend in ((mine, "cpu"), (plain, "reference")):
            errors.append((attention(q, k, v, backend=backend) - exact).abs().max())
    assert sum(mine) <= 1.5 * sum(plain)
