"""Nothing grows with the number of calls: not the process, and not what calls remember."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_attn

CALLS = 1000
STATM = Path("/proc/self/statm")
pytestmark = [
    pytest.mark.skipif(not STATM.exists(), reason="the memory of a process is read from /proc"),
    pytest.mark.usefixtures("one_thread"),
]
# An allocator keeps some pages; a leak of one small tensor a call would be 4 MiB and more.
ALLOWED = 2 << 20


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


q, x, w, b = leaf(2, 2, 9, 8), leaf(32, 32), leaf(32), leaf(32)
layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True)
tokens = torch.randint(0, 9, (4, 7))
starts = torch.tensor([0, 4, 9], dtype=torch.int32)
rows = leaf(9, 2, 8)
PADDING = torch.arange(7)[None] >= torch.tensor([[7], [3]])

CALLED: dict[str, Callable[[], Tensor]] = {
    "attention": lambda: fused_attn.attention(q, q, q, causal=True),
    "attention with dropout": lambda: fused_attn.attention(q, q, q, dropout_p=0.1),
    "attention with weights": lambda: fused_attn.attention(q, q, q, return_weights="per_head")[1],
    "attention with a bias": lambda: fused_attn.attention(q, q, q, bias=x[:9, :9]),
    "varlen": lambda: fused_attn.attention_varlen(rows, rows, rows, starts, starts, 5, 5),
    "flex": lambda: fused_attn.flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 0.5),
    "sdpa": lambda: fused_attn.scaled_dot_product_attention(q, q, q),
    "layer_norm": lambda: fused_attn.layer_norm(x, (32,), w, b),
    "add_rms_norm": lambda: fused_attn.add_rms_norm(x, x, (32,), w)[0],
    "bias_activation": lambda: fused_attn.bias_activation(x, b, activation="gelu"),
    "embedding": lambda: fused_attn.embedding(tokens, x),
    "linear": lambda: fused_attn.linear(x, x, b),
    "encoder layer": lambda: layer(q.view(2, 2 * 9, 8)[:, :7].repeat(1, 1, 2)),
    "padded encoder layer": lambda: layer(
        q.view(2, 18, 8)[:, :7].repeat(1, 1, 2), src_key_padding_mask=PADDING
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_process_does_not_grow(name: str) -> None:
    call = CALLED[name]

    def many(count: int) -> None:
        for _ in range(count):
            call().sum().backward()
            with torch.no_grad():
                call()

    many(CALLS // 4)
    before = resident()
    many(CALLS)
    assert resident() - before < ALLOWED


def test_calls_of_ever_new_lengths_are_not_all_remembered() -> None:
    def many(begin: int) -> None:
        for length in range(begin, begin + 3 * CALLS):
            y = torch.randn(1, 1, length, 4)
            fused_attn.attention(y[:, :, :3], y, y)
            fused_attn.layer_norm(y[0, 0, :, :], (4,))

    many(1)
    before = resident()
    many(3 * CALLS + 1)
    assert resident() - before < ALLOWED
