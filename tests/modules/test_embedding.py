"""FusedTransformerEmbedding and the positional encodings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn import (
    FusedTransformerEmbedding,
    LearnedPositionalEncoding,
    SinusoidalPositionalEncoding,
    TransformerEmbedding,
)
from fused_attn.testing import assert_within_budget

V, E, PAD = 20, 24, 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Keywords of every call of the operation."""
    from fused_attn.modules import embedding as module

    seen: list[dict] = []

    def counted(*args, **kwargs):
        seen.append(kwargs)
        return fused_attn.embedding(*args, **kwargs)

    monkeypatch.setattr(module, "embedding", counted)
    return seen


def pair(positions: str, dropout: float = 0.0) -> tuple[TransformerEmbedding, TransformerEmbedding]:
    arguments = (V, E, PAD, 30, positions, dropout)
    ours, stock = FusedTransformerEmbedding(*arguments), TransformerEmbedding(*arguments)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def test_sinusoids_are_the_papers() -> None:
    for width in (1, 7, 16):
        table = SinusoidalPositionalEncoding(width, 50).table
        for p, i in ((0, 0), (1, width - 1), (49, width // 2)):
            angle = p / 10000 ** ((i - i % 2) / width)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert abs(float(table[p, i]) - expected) < 1e-6
    assert SinusoidalPositionalEncoding(8).state_dict() == {}


@pytest.mark.parametrize("cls", [SinusoidalPositionalEncoding, LearnedPositionalEncoding])
def test_encoding_alone_adds_its_rows_and_refuses_what_does_not_fit(cls: type) -> None:
    encoding, x = cls(8, 10), torch.randn(2, 4, 8)
    assert torch.equal(encoding(x, offset=3), x + encoding.table[3:7])
    with pytest.raises(ValueError, match=r"max_len = 10\), got 7 .. 10"):
        encoding(x, offset=7)
    with pytest.raises(ValueError, match=r"`x` must be \(\*, L, 8\)"):
        encoding(x[..., :7])
    with pytest.raises(ValueError, match="`max_len` must be a positive int, got 0"):
        cls(8, 0)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "none"])
def test_one_pass_agrees_with_the_stock_parts(calls: list[dict], positions: str) -> None:
    ours, stock = pair(positions)
    exact = TransformerEmbedding(V, E, PAD, 30, positions, 0.0, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    if positions == "sinusoidal":
        exact.encoding.table = ours.encoding.table.double()  # as it is stored
    tokens = torch.randint(V, (3, 8))
    outputs = [model(tokens, offset=5) for model in (ours, stock, exact)]
    assert_within_budget("output", *outputs)
    grads = []
    for out, model in zip(outputs, (ours, stock, exact), strict=True):
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_within_budget("gradients", *grads, factor=3.0)
    assert len(calls) == 1
    assert bool((ours.embedding.weight.grad[PAD] == 0).all())


def test_padding_row_starts_as_zero_and_rows_have_unit_variance_once_scaled() -> None:
    ours = FusedTransformerEmbedding(5000, 64, PAD, positions="none")
    assert bool((ours.embedding.weight[PAD] == 0).all())
    assert abs(float((ours.embedding.weight.detach() * ours.scale).std()) - 1.0) < 0.02


def test_dropout_is_part_of_the_operation_in_training_only(calls: list[dict]) -> None:
    ours, _ = pair("sinusoidal", dropout=0.5)
    tokens = torch.randint(1, V, (3, 8))
    ours(tokens)
    ours.eval()(tokens)
    assert [call["dropout_p"] for call in calls] == [0.5, 0.0]


def test_tied_output_projection_gets_both_gradients() -> None:
    ours, stock = pair("sinusoidal")
    tokens = torch.randint(V, (3, 8))
    for model in (ours, stock):
        generator = nn.Linear(E, V, bias=False)
        generator.weight = model.embedding.weight
        generator(model(tokens)).logsumexp(-1).sum().backward()
    torch.testing.assert_close(ours.embedding.weight.grad, stock.embedding.weight.grad)


def test_what_is_not_plain_is_called_as_the_module_that_it_is(calls: list[dict]) -> None:
    tokens = torch.randint(V, (3, 8))
    for change in (
        lambda m: m.embedding.register_forward_hook(lambda *_: None),
        lambda m: m.dropout.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "dropout", nn.Identity()),
        lambda m: setattr(m.embedding, "max_norm", 0.5),
    ):
        ours, stock = pair("learned")
        change(ours)
        if ours.embedding.max_norm is not None:
            stock.embedding.max_norm = 0.5
        torch.testing.assert_close(ours(tokens), stock(tokens))
    assert calls == []


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="`positions` must be one of 'sinusoidal'"):
        FusedTransformerEmbedding(V, E, positions="rotary")
    with pytest.raises(ValueError, match="`table` must have a row for each of the 31 positions"):
        pair("learned")[0](torch.zeros(1, 31, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="FusedTransformerEmbedding"):
        torch.jit.script(pair("none")[0])
