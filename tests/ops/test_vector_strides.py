"""Vectors of numbers (lengths, slopes, seeds) may have any strides, for every operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_attn import add_layer_norm, attention, attention_varlen, bias_activation, embedding


def spread(vector: Tensor) -> Tensor:
    """The same numbers with others between them in memory."""
    result = torch.stack((vector, ~vector), dim=1)[:, 0]
    assert not result.is_contiguous()
    return result


def test_attention_vectors_may_have_any_strides(attention_backend: str) -> None:
    q, k, v = (torch.randn(4, 2, 20, 8) for _ in range(3))
    lengths = torch.tensor([15])
    slopes = torch.tensor([0.5, 9.0, 0.25, 9.0])[::2]
    expected = attention(
        q, k, v, key_lengths=torch.full((4,), 15), alibi_slopes=torch.tensor([0.5, 0.25]),
        backend=attention_backend,
    )  # fmt: skip
    actual = attention(
        q, k, v, key_lengths=lengths.expand(4), alibi_slopes=slopes, backend=attention_backend
    )
    assert torch.equal(actual, expected)


def test_packed_vectors_may_have_any_strides(attention_backend: str) -> None:
    q, k, v = (torch.randn(40, 2, 8, requires_grad=True) for _ in range(3))
    starts, rng = torch.tensor([0, 15, 40], dtype=torch.int32), torch.tensor([3, 4])

    def run(starts: Tensor, rng: Tensor) -> tuple[Tensor, ...]:
        out = attention_varlen(
            q, k, v, starts, starts, 25, 25, dropout_p=0.3, dropout_rng=rng,
            backend=attention_backend,
        )  # fmt: skip
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    for actual, expected in zip(run(spread(starts), spread(rng)), run(starts, rng), strict=True):
        assert torch.equal(actual, expected)


def check_dropout_rng(run: Callable[[Tensor], Tensor]) -> None:
    rng = torch.tensor([3, 4])
    assert torch.equal(run(rng), run(spread(rng)))


def test_dropout_rng_of_layer_norm(layer_norm_backend: str) -> None:
    x = torch.ones(7, 64)
    check_dropout_rng(
        lambda rng: add_layer_norm(
            x, x, 64, dropout_p=0.3, dropout_rng=rng, backend=layer_norm_backend
        )
    )


def test_dropout_rng_of_bias_activation(bias_activation_backend: str) -> None:
    x = torch.ones(7, 64)
    check_dropout_rng(
        lambda rng: bias_activation(
            x, activation="gelu", dropout_p=0.3, dropout_rng=rng, backend=bias_activation_backend
        )
    )


def test_dropout_rng_of_embedding(embedding_backend: str) -> None:
    tokens, weight = torch.zeros(7, dtype=torch.int64), torch.ones(1, 64)
    check_dropout_rng(
        lambda rng: embedding(
            tokens, weight, dropout_p=0.3, dropout_rng=rng, backend=embedding_backend
        )
    )
