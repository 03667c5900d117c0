"""FusedMultiheadAttention against torch.nn.MultiheadAttention; the linears are torch's on both."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import fused_attn
from fused_attn.testing import assert_within_budget

from .row import BF16, FP32, SHORT_NAMES, Row, Side, check

WIDTH, HEADS = 512, 8


def _build(
    dtype: torch.dtype, batch: int, length: int, padded: bool, need_weights: bool
) -> dict[str, Side]:
    stock = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).to(dtype).eval()
    ours = fused_attn.FusedMultiheadAttention(WIDTH, HEADS, batch_first=True).to(dtype).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(batch, length, WIDTH).to(dtype)
    arguments: dict[str, Any] = {"need_weights": need_weights}
    if padded:
        lengths = (torch.linspace(1 / 3, 1.0, batch) * length).round().long()
        arguments["key_padding_mask"] = torch.arange(length) >= lengths[:, None]

    def run(module: nn.Module, fast_path: bool = True) -> torch.Tensor:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(fast_path)
        try:
            with torch.no_grad():
                return module(x, x, x, **arguments)[0]
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    def compare() -> None:
        plain = run(stock, False)
        exact = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval()
        exact.load_state_dict(stock.state_dict())
        z = x[:1].double()
        masks = {k: v[:1] for k, v in arguments.items() if k == "key_padding_mask"}
        with torch.no_grad():
            truth = exact(z, z, z, need_weights=False, **masks)[0]
        assert_within_budget("out", run(ours)[:1], plain[:1], truth)

    return {
        "ours": Side(functools.partial(run, ours), check(compare)),
        "slow path": Side(functools.partial(run, stock, False)),
        "fast path": Side(functools.partial(run, stock, True)),
    }


def rows() -> list[Row]:
    result = []

    def add(
        gate: float, goal: float, dtype: torch.dtype, batch: int, length: int,
        padded: bool = False, need_weights: bool = False,
    ) -> None:  # fmt: skip
        label = (" padding" if padded else "") + (" weights" if need_weights else "")
        name = f"{SHORT_NAMES[dtype]} module {batch}x{length}x{WIDTH}{label}"
        build = functools.partial(_build, dtype, batch, length, padded, need_weights)
        result.append(Row(name, gate, goal, dtype, build))

    add(1.8, 2.3, BF16, 1, 2048)
    add(4.0, 6.0, BF16, 2, 2048, padded=True)
    add(2.0, 3.0, BF16, 1, 2048, need_weights=True)
    add(1.2, 1.4, FP32, 1, 2048)
    for dtype in (FP32, BF16):
        add(1.0, 1.1, dtype, 32, 100)
        add(1.0, 1.3, dtype, 32, 100, padded=True)
    return result
