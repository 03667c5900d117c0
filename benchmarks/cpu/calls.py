"""What a call costs when there is nothing to compute: (1, 2, 4, 16) against torch's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fused_attn

from .row import FP32, Row, Side

SHAPE = (1, 2, 4, 16)


def _forward() -> dict[str, Side]:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    return {
        "ours": Side(functools.partial(fused_attn.attention, q, k, v)),
        "sdpa": Side(functools.partial(sdpa, q, k, v)),
    }


def _backward() -> dict[str, Side]:
    q, k, v = (torch.randn(SHAPE, requires_grad=True) for _ in range(3))
    grad = torch.randn(SHAPE)

    def run(function: object) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(q, k, v), (q, k, v), grad)

    return {
        "ours": Side(functools.partial(run, fused_attn.attention)),
        "sdpa": Side(functools.partial(run, sdpa)),
    }


def rows() -> list[Row]:
    # Gates and goals say our time over SDPA's: 1.5 and 1.0 without, 1.0 and 0.8 with gradient.
    return [
        Row("fp32 tiny call", 1 / 1.5, 1.0, FP32, _forward),
        Row("fp32 tiny call fwd+bwd", 1.0, 1 / 0.8, FP32, _backward),
    ]
