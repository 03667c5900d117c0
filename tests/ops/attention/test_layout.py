"""The layout (B, L, H, D): the same numbers, and nothing is copied."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k and v, (B, L, heads, D): as a packed projection leaves them."""
    packed = torch.randn(2, 70, 4 * 16 + 2 * 16 + 2 * 16).to(dtype)
    q, k, v = packed.split((64, 32, 32), dim=-1)
    return q.unflatten(-1, (4, 16)), k.unflatten(-1, (2, 16)), v.unflatten(-1, (2, 16))


@pytest.mark.parametrize("extra", [{}, {"return_lse": True}, {"sinks": torch.zeros(4)}])
def test_both_layouts_agree(attention_backend: str, extra: dict) -> None:
    blhd = [x.detach().clone().requires_grad_() for x in operands()]
    bhld = [x.detach().transpose(1, 2).clone().requires_grad_() for x in blhd]
    arguments = {"causal": True, "backend": attention_backend, **extra}
    ours = fused_attn.attention(*blhd, layout="blhd", **arguments)
    other = fused_attn.attention(*bhld, **arguments)
    if "return_lse" in extra:
        assert torch.equal(ours[1], other[1])
        ours, other = ours[0], other[0]
    assert ours.shape == (2, 70, 4, 16)
    assert torch.equal(ours, other.transpose(1, 2))
    dout = torch.randn_like(ours)
    ours.backward(dout)
    other.backward(dout.transpose(1, 2))
    for a, b in zip(blhd, bhld, strict=True):
        torch.testing.assert_close(a.grad, b.grad.transpose(1, 2))


class Copies(TorchDispatchMode):
    """Notes operators that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("clone", "copy", "contiguous")):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_copy_around_the_kernel() -> None:
    q, k, v = operands()
    with Copies() as copies:
        out = fused_attn.attention(q, k, v, layout="blhd")
    assert copies.seen == []
    assert out.is_contiguous()


def test_out_has_the_layout_too(attention_backend: str) -> None:
    q, k, v = operands()
    out = torch.empty(2, 70, 4, 16)
    found = fused_attn.attention(q, k, v, layout="blhd", out=out, backend=attention_backend)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(out, fused_attn.attention(q, k, v, layout="blhd", backend=attention_backend))


def test_layouts_compile() -> None:
    torch._dynamo.reset()
    q, k, v = operands()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fused_attn.attention(q, k, v, layout="blhd", causal=True).flatten(2)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), run(q, k, v))


def test_an_unknown_layout_is_named() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="`layout` must be 'bhld' or 'blhd', got 'lbhd'"):
        fused_attn.attention(q, q, q, layout="lbhd")
    with pytest.raises(ValueError, match=r"`q` must have 4 dimensions \(B, L, heads, head size\)"):
        fused_attn.attention(q[0], q, q, layout="blhd")
    assert fused_attn.explain(q, q, q, layout="blhd").problem.seqlen_q == 2
