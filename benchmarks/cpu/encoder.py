"""FusedTransformerEncoderLayer against torch.nn.TransformerEncoderLayer, training and inference.

The four linears are torch's on both sides. With padding, ours runs on the real tokens only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn.testing import assert_within_budget

from .row import BF16, FP32, SHORT_NAMES, Row, Side, check

TOKENS = 2048


def _layer(kind: type[nn.Module], width: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return kind(width, width // 64, 4 * width, dropout=0.1, batch_first=True).to(dtype)


def _step(layer: nn.Module, x: Tensor, padding: Tensor | None, grad: Tensor) -> Tensor:
    out = layer(x, src_key_padding_mask=padding)
    out.backward(grad)
    return out


def _infer(layer: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    with torch.no_grad():
        return layer(x, src_key_padding_mask=padding)


def _build(
    dtype: torch.dtype, width: int, length: int, padded: bool, training: bool
) -> dict[str, Side]:
    stock = _layer(nn.TransformerEncoderLayer, width, dtype).train(training)
    ours = _layer(fused_attn.FusedTransformerEncoderLayer, width, dtype).train(training)
    ours.load_state_dict(stock.state_dict())
    batch = TOKENS // length
    x = torch.randn(batch, length, width).to(dtype).requires_grad_(training)
    padding = None
    if padded:
        lengths = (torch.linspace(1 / 3, 1.0, batch) * length).round().long()
        padding = torch.arange(length) >= lengths[:, None]
    grad = torch.randn(batch, length, width).to(dtype)

    def run(layer: nn.Module) -> Callable[[], Tensor]:
        if training:
            return functools.partial(_step, layer, x, padding, grad)
        return functools.partial(_infer, layer, x, padding)

    def compare() -> None:
        exact = _layer(nn.TransformerEncoderLayer, width, torch.float64).eval()
        exact.load_state_dict(stock.state_dict())
        some = x.detach()[-1:]
        results = [_infer(layer.eval(), some, None) for layer in (ours, stock)]
        stock.train(training), ours.train(training)
        assert_within_budget("out", *results, _infer(exact, some.double(), None))

    return {"ours": Side(run(ours), check(compare)), "torch.nn": Side(run(stock))}


def rows() -> list[Row]:
    result = []
    for dtype in (FP32, BF16):
        for width in (512, 768):
            for length in (128, 512):
                for padded in (False, True):
                    for training in (True, False):
                        name = (
                            f"{SHORT_NAMES[dtype]} encoder {'train' if training else 'infer'} "
                            f"d{width} L{length}{' padding' if padded else ''}"
                        )
                        build = functools.partial(_build, dtype, width, length, padded, training)
                        gate = 1.3 if padded else 1.0
                        result.append(Row(name, gate, gate, dtype, build))
    return result
