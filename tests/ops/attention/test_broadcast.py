"""One batch of queries against many of keys, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import attention

SIZES = {
    "queries": (1, 3, 3),
    "keys": (3, 1, 1),
    "keys alone": (3, 1, 3),
    "queries and values": (1, 3, 1),
    "nothing": (1, 0, 0),
}


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("name", SIZES)
def test_one_stands_for_all(attention_backend: str, name: str, layout: str) -> None:
    """Values and gradients are those of torch's own broadcasting."""
    batches = SIZES[name]
    sizes = zip(batches, (4, 2, 2), (9, 20, 20), strict=True)
    inputs = [torch.randn(b, h, n, 16, requires_grad=True) for b, h, n in sizes]
    batch = next((b for b in batches if b != 1), 1)
    padding = torch.rand(batch, 20) < 0.7
    given = inputs if layout == "bhld" else [x.transpose(1, 2) for x in inputs]
    arguments: dict[str, Any] = {"key_padding_mask": padding, "layout": layout}
    out = attention(*given, backend=attention_backend, **arguments)
    out = out if layout == "bhld" else out.transpose(1, 2)
    q, k, v = (x.expand(batch, -1, -1, -1) for x in inputs)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.mT / 4).masked_fill(~padding[:, None, None], -torch.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(expected)
    found = torch.autograd.grad((out * dout).sum(), inputs)
    for actual, right, x in zip(
        found, torch.autograd.grad((expected * dout).sum(), inputs), inputs, strict=True
    ):
        assert actual.shape == x.shape
        torch.testing.assert_close(actual, right)


def test_nothing_is_copied_for_it() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(5, 2, 4, 8)
    out = torch.empty(5, 2, 3, 8)
    assert attention(q, k, k, out=out) is out
    torch.testing.assert_close(out, attention(q.expand(5, -1, -1, -1), k, k))
    with pytest.raises(ValueError, match=r"`out` must have shape .* = \(5, 2, 3, 8\)"):
        attention(q, k, k, out=torch.empty(1, 2, 3, 8))


def test_the_backward_as_a_function_sums() -> None:
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(5, 2, 4, 8)
    sinks = torch.randn(2)
    out, lse = attention(q, k, k, sinks=sinks, return_lse=True)
    dout = torch.randn_like(out)
    found = fused_attn.attention_backward(dout, q, k, k, out, lse, sinks=sinks)
    assert found.dq.shape == q.shape
    torch.testing.assert_close(found.dq, torch.autograd.grad(out, q, dout)[0])


def test_it_compiles() -> None:
    torch._dynamo.reset()
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(5, 2, 4, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, k), attention(q, k, k))
    grads = [torch.autograd.grad(f(q, k, k).sum(), q)[0] for f in (compiled, attention)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("batches", [(2, 3, 3), (3, 2, 2), (1, 2, 3), (2, 3, 1)])
def test_other_sizes_are_refused_by_name(batches: tuple[int, int, int]) -> None:
    q, k, v = (torch.randn(b, 2, 4, 8) for b in batches)
    with pytest.raises(ValueError, match=r"`[kv]` must have shape \(B, Hkv, Lk, Dv?\)"):
        attention(q, k, v)
