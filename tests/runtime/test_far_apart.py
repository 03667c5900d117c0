"""Rows more than 2^31 elements apart: every size and offset is computed in 64 bits.

The memory is a file without contents, of which only what is written takes space.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.runtime import native

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason="no compiled part"),
    pytest.mark.skipif(sys.platform != "linux", reason="wants files without contents"),
]
APART = 2**31 + 24  # elements


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path = Path(tmp_path_factory.mktemp("far")) / "memory"
    return torch.from_file(str(path), shared=True, size=2 * APART + 4096, dtype=torch.bfloat16)


def far(memory: Tensor, x: Tensor, dim: int) -> Tensor:
    """The numbers of x, of which dimension `dim` (of up to 3) strides over the memory."""
    strides = list(torch.empty(x.shape, device="meta").stride())
    strides[dim] = APART
    y = memory.as_strided(x.shape, strides)
    y.copy_(x)
    return y


CALLS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Any]]] = {
    "q of few queries": ((1, 1, 3, 16), 2, lambda x: attend(x, 0)),
    "heads of q": ((1, 2, 40, 16), 1, lambda x: attend(x, 0)),
    "k, batch": ((2, 1, 40, 16), 0, lambda x: attend(x, 1)),
    "k, rows": ((1, 1, 3, 16), 2, lambda x: attend(x, 1)),
    "v, rows": ((1, 1, 3, 16), 2, lambda x: attend(x, 2)),
    "v, columns": ((1, 1, 5, 3), 3, lambda x: attend(x, 2)),
    "bias": ((3, 40), 0, lambda x: attend(x, 3)),
    "layer_norm": ((3, 16), 0, lambda x: fused_attn.layer_norm(x, (16,))),
    "rms_norm, columns": ((16, 3), 1, lambda x: fused_attn.rms_norm(x, (3,))),
    "bias_activation": ((3, 16), 0, lambda x: fused_attn.bias_activation(x, activation="gelu")),
    "linear, x": ((3, 16), 0, lambda x: fused_attn.linear(x, weights(5, 16))),
    "linear, weight": ((3, 16), 0, lambda w: fused_attn.linear(weights(5, 16), w)),
    "linear, weight by columns": ((16, 3), 1, lambda w: fused_attn.linear(weights(5, 3), w)),
    "embedding": ((3, 16), 0, lambda w: fused_attn.embedding(torch.tensor([[2, 0, 1]]), w)),
}


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def attend(x: Tensor, which: int) -> Tensor:
    """Attention in which `x` is q, k, v or the bias."""
    if which == 3:
        q, k = weights(1, 2, x.shape[0], 16), weights(1, 2, x.shape[1], 16)
        return fused_attn.attention(q, k, k, bias=x, backend="cpu")
    batch, heads, length, width = x.shape
    given = [weights(batch, heads, 4, 16), *[weights(batch, heads, length, 16)] * 2]
    if which == 2 and width != 16:
        given[1] = weights(batch, heads, length, 16)
    given[which] = x
    return fused_attn.attention(*given, backend="cpu")


@pytest.mark.parametrize("name", CALLS)
def test_far_rows_give_the_same(name: str, memory: Tensor) -> None:
    shape, dim, call = CALLS[name]
    x = torch.randn(shape).bfloat16()
    spread = far(memory, x, dim)
    assert spread.stride(dim) == APART
    found, expected = call(spread), call(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["heads of q", "k, rows", "v, rows", "layer_norm", "linear, x"])
def test_and_so_do_their_gradients(name: str, memory: Tensor) -> None:
    shape, dim, call = CALLS[name]
    x = torch.randn(shape).bfloat16()
    found = []
    for given in (far(memory, x, dim), x):
        leaf = given.detach().requires_grad_()
        call(leaf).float().sin().sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad.clone())
    assert torch.equal(*found)
