"""What autocast leaves as it is: float64 and whole numbers, in every operation that it reaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.runtime import autocast

Call = Callable[[Tensor], Tensor]


def _varlen(x: Tensor) -> Tensor:
    rows = x[0].transpose(0, 1).contiguous()
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    return fused_attn.attention_varlen(rows, rows, rows, starts, starts, 3, 3)


def _feed_forward(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    block = fused_attn.FusedFeedForward(16, 64, 0.0, "gelu", dtype=x.dtype)
    return block(x)


def _module(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    module = fused_attn.FusedMultiheadAttention(16, 2, batch_first=True, dtype=x.dtype)
    return module(x[0], x[0], x[0])[0]


CALLS: dict[str, Call] = {
    "attention": lambda x: fused_attn.attention(x, x, x, causal=True),
    "attention with a bias": lambda x: fused_attn.attention(x, x, x, bias=x[..., :6]),
    "attention_varlen": _varlen,
    "flex_attention": lambda x: fused_attn.flex_attention(x, x, x, lambda s, b, h, i, j: s * s),
    "linear": lambda x: fused_attn.linear(x, x[0, 0, :, :], activation="gelu"),
    "feed-forward": _feed_forward,
    "multi-head attention": _module,
}


def operand(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", CALLS)
def test_float64_stays(name: str) -> None:
    x = operand(torch.float64).requires_grad_()
    plain = CALLS[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = CALLS[name](x)
    assert ours.dtype == plain.dtype == torch.float64
    assert torch.equal(ours, plain)
    mine, right = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (ours, plain))
    assert torch.equal(mine, right)


@pytest.mark.parametrize("name", CALLS)
def test_float32_does_not(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert CALLS[name](operand(torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_the_dtype_of_what_stays(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    assert autocast.dtype_for(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast.dtype_for(x) is None
        assert autocast.dtype_for(1.0) is None
        assert autocast.dtype_for(torch.ones(3)) == torch.bfloat16
