"""Attention sinks: one more key with a score of its own and value 0, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import fused_attn


def test_a_sink_is_one_more_key_of_value_zero(attention_backend: str) -> None:
    """By torch alone: the sink's column is appended and its share thrown away."""
    q, k, v = torch.randn(3, 2, 4, 20, 16)
    sinks = torch.randn(4)
    scores = torch.cat([q @ k.mT / 4.0, sinks[:, None, None].expand(2, 4, 20, 1)], dim=-1)
    expected = scores.softmax(dim=-1)[..., :-1] @ v
    out, lse = fused_attn.attention(
        q, k, v, sinks=sinks, return_lse=True, backend=attention_backend
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))


def test_equal_scores_share_with_the_sink(attention_backend: str) -> None:
    q = torch.zeros(1, 1, 1, 4)
    k, v = torch.randn(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    sinks = torch.zeros(1)
    out, lse, weights = fused_attn.attention(
        q, k, v, sinks=sinks, return_lse=True, return_weights="per_head",
        backend=None if attention_backend == "cuda" else attention_backend,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.full_like(out, 0.75))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4.0)))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


@pytest.mark.parametrize("sink", [-torch.inf, 1e30, -1e30, 0.0])
def test_extreme_sinks(attention_backend: str, sink: float) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 5, 8))
    sinks = torch.tensor([sink, 0.0], requires_grad=True)
    seen = torch.tensor([[True, True, True, True, False]])
    arguments = {"key_padding_mask": seen, "backend": attention_backend}
    out, lse = fused_attn.attention(q, k, v, sinks=sinks, return_lse=True, **arguments)
    (out.sum() + lse[:, 1].sum()).backward()
    for x in (out, q.grad, k.grad, v.grad, sinks.grad):
        assert x.isfinite().all()
    plain = fused_attn.attention(q, k, v, **arguments)[:, 0]
    expected = torch.zeros_like(plain) if sink == 1e30 else plain
    if sink != 0.0:
        torch.testing.assert_close(out[:, 0], expected)


def test_a_row_without_keys_sees_the_sink_alone(attention_backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 3, 8))
    sinks = torch.tensor([1.5, -torch.inf], requires_grad=True)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    out, lse = fused_attn.attention(
        q, k, v, sinks=sinks, key_padding_mask=nothing, return_lse=True, backend=attention_backend
    )
    assert (out == 0).all()
    assert (lse[:, 0] == 1.5).all()
    assert (lse[:, 1] == -torch.inf).all()
    out.sum().backward()
    assert (sinks.grad == 0).all()


def test_packed_batches_have_sinks(attention_backend: str) -> None:
    lengths = [5, 1, 9]
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    q, k, v = torch.randn(3, 17, 4, 16)
    sinks = torch.randn(4)
    out, lse = fused_attn.attention_varlen(
        q, k, v, cu_seqlens, cu_seqlens, 9, 9, sinks=sinks, causal=True, return_lse=True,
        backend=attention_backend,
    )  # fmt: skip
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        alone, alone_lse = fused_attn.attention(
            *(x[None, rows] for x in (q, k, v)), layout="blhd", causal=True, sinks=sinks,
            return_lse=True, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out[rows], alone[0])
        torch.testing.assert_close(lse[:, rows], alone_lse[0])
    assert (out[15:] == 0).all()
    assert (lse[:, 15:] == -torch.inf).all()


def test_sinks_compile(attention_backend: str) -> None:
    torch._dynamo.reset()

    def run(q: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return fused_attn.attention(q, q, q, sinks=sinks, causal=True, backend=attention_backend)

    q, sinks = torch.randn(1, 2, 6, 8, requires_grad=True), torch.randn(2, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, sinks), run(q, sinks))
    grads = torch.autograd.grad(compiled(q, sinks).sum(), (q, sinks))
    for a, b in zip(grads, torch.autograd.grad(run(q, sinks).sum(), (q, sinks)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_wrong_with_sinks_is_said() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"`sinks` must have shape \(H,\) = \(2,\), got \(3,\)"):
        fused_attn.attention(q, q, q, sinks=torch.zeros(3))
    with pytest.raises(TypeError, match=r"`sinks` must be .*, got torch.int64"):
        fused_attn.attention(q, q, q, sinks=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="`sinks` must be a tensor"):
        fused_attn.attention(q, q, q, sinks=[0.0, 0.0])
    with pytest.raises(ValueError, match="`out` must be None where a gradient is wanted"):
        fused_attn.attention(q, q, q, sinks=torch.zeros(2, requires_grad=True), out=q.clone())


def test_explain_says_that_sinks_do_not_decide() -> None:
    q = torch.randn(1, 2, 3, 4)
    told = fused_attn.explain(q, q, q, sinks=torch.zeros(2))
    assert told.chosen == fused_attn.explain(q, q, q).chosen
    assert "sinks" in str(told)
