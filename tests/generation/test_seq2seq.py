"""Seq2SeqTransformer on fused modules and on stock torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import FusedTransformer, Seq2SeqTransformer

V, PAD = 17, 0
SMALL: dict[str, Any] = {
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 32,
    "dropout": 0.0,
    "max_len": 24,
}


def build(seed: int = 0, src_vocab: int = V, **arguments: Any) -> Seq2SeqTransformer:
    torch.manual_seed(seed)
    return Seq2SeqTransformer(src_vocab, **(SMALL | arguments))


def batch(lengths: tuple[int, ...] = (7, 3, 5)) -> Tensor:
    """Sentences of these lengths, padded."""
    tokens = torch.randint(1, V, (len(lengths), max(lengths)))
    return torch.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], tokens, PAD)


def loss_of(model: Seq2SeqTransformer, src: Tensor, tgt: Tensor) -> Tensor:
    logits = model(src, tgt[:, :-1])
    return F.cross_entropy(
        logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1
    )


@pytest.mark.parametrize("tgt_vocab", [None, 11])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_both_backends_are_one_model(
    norm_first: bool, positions: str, tgt_vocab: int | None
) -> None:
    arguments = {"norm_first": norm_first, "positions": positions, "tgt_vocab": tgt_vocab}
    ours, stock = build(**arguments), build(**arguments, backend="torch")
    assert type(ours.transformer) is FusedTransformer
    assert type(stock.transformer) is nn.Transformer
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    src, tgt = batch(), batch((4, 9, 6)).clamp(max=10)
    losses = [loss_of(model, src, tgt) for model in (ours, stock)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_and_later_tokens_change_nothing(norm_first: bool, positions: str) -> None:
    model = build(norm_first=norm_first, positions=positions).eval()
    src, tgt = batch((7, 3)), batch((6, 6))
    logits = model(src, tgt)
    torch.testing.assert_close(model(src[1:, :3], tgt[1:]), logits[1:])
    changed = tgt.clone()
    changed[:, 4:] = 1 + tgt[:, 4:] % (V - 1)
    torch.testing.assert_close(model(src, changed)[:, :4], logits[:, :4])
    assert not torch.allclose(model(src, changed)[:, 4:], logits[:, 4:])


def test_order_of_the_source_matters_with_every_kind_of_position() -> None:
    for positions in ("sinusoidal", "learned", "rotary"):
        model = build(positions=positions).eval()
        src, tgt = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[1, 2]])
        assert not torch.allclose(model(src, tgt), model(src.flip(1), tgt), atol=1e-4), positions


def test_tied_and_shared_weights_are_one_tensor() -> None:
    model = build()
    assert model.src_embedding is model.tgt_embedding
    assert model.generator.weight is model.tgt_embedding.embedding.weight
    apart = build(tgt_vocab=11, tie_embeddings=False)
    assert apart.generator.weight is not apart.tgt_embedding.embedding.weight
    assert apart(batch(), batch() % 11).shape == (3, 7, 11)
    assert len(list(apart.parameters())) == len(list(model.parameters())) + 2


def test_a_step_of_training_lowers_the_loss_on_both_backends() -> None:
    src, tgt = batch(), batch((4, 9, 6))
    for backend in ("fused", "torch"):
        model = build(backend=backend)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(12):
            loss = loss_of(model, src, tgt)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"backend": "cuda"}, "`backend` must be 'fused' or 'torch', got 'cuda'"),
    ({"positions": "alibi"}, "`positions` must be one of 'sinusoidal'"),
    ({"positions": "rotary", "backend": "torch"}, "must not be 'rotary' on torch.nn"),
    ({"positions": "rotary", "nhead": 16}, "`rotary_base` needs an even head size, got 1"),
    ({"dropout": 2.0}, "`dropout`|dropout probability"),
])  # fmt: skip
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_sequences_longer_than_the_model_are_refused() -> None:
    model, long = build(), torch.ones(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`src` must be .*max_len = 24"):
        model(long, long[:, :3])
    with pytest.raises(ValueError, match=r"`tgt` must be .*max_len = 24"):
        model(long[:, :3], long)
    with pytest.raises(ValueError, match=r"`max_len` must be in \[1, 24\], got 25"):
        model.start(long[:, :3], 25)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = build(norm_first=True, num_encoder_layers=1, num_decoder_layers=1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    src, tgt = batch(), batch((4, 4, 4))
    torch.testing.assert_close(compiled(src, tgt), model(src, tgt))
