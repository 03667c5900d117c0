"""Greedy, sampled and beam search; with caches and without."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import Seq2SeqTransformer, beam_search, greedy_search, sample
from fused_attn.generation.decoding import CachedDecoding, PlainDecoding
from fused_attn.generation.search import keep_likeliest
from tests.generation.test_seq2seq import PAD, V, batch, build

BOS, EOS = 1, 2
ENDS = {"bos": BOS, "eos": EOS}


def sharp(seed: int = 0, **arguments: Any) -> Seq2SeqTransformer:
    """A model in float64 whose choices are far apart: rounding does not decide."""
    model = build(seed, dtype=torch.float64, **arguments).eval()
    with torch.no_grad():
        model.tgt_embedding.embedding.weight.mul_(4.0)
    return model


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_cached_steps_give_the_logits_of_the_whole(norm_first: bool, positions: str) -> None:
    model = sharp(norm_first=norm_first, positions=positions)
    src, tgt = batch(), torch.randint(1, V, (3, 8))
    expected = model(src, tgt)
    for use_cache, kind in ((True, CachedDecoding), (False, PlainDecoding)):
        decoding = model.start(src, 8, use_cache=use_cache)
        assert type(decoding) is kind
        with torch.no_grad():
            logits = torch.stack([decoding.step(tgt[:, i]) for i in range(8)], dim=1)
        torch.testing.assert_close(logits, expected)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    max_len=st.integers(1, 12),
    norm_first=st.booleans(),
    positions=st.sampled_from(["sinusoidal", "learned", "rotary"]),
    beams=st.integers(1, 5),
)
def test_caches_change_no_token(
    seed: int, lengths: list[int], max_len: int, norm_first: bool, positions: str, beams: int
) -> None:
    model = sharp(seed, norm_first=norm_first, positions=positions)
    src = batch(tuple(lengths))
    for search in (
        lambda use_cache: greedy_search(model, src, **ENDS, max_len=max_len, use_cache=use_cache),
        lambda use_cache: sample(
            model, src, **ENDS, max_len=max_len, temperature=0.9, top_k=7, top_p=0.9,
            generator=torch.Generator().manual_seed(seed), use_cache=use_cache,
        ),
        lambda use_cache: beam_search(
            model, src, **ENDS, max_len=max_len, beams=beams, use_cache=use_cache
        ),
    ):  # fmt: skip
        cached, plain = search(True), search(False)
        assert torch.equal(cached.tokens, plain.tokens)
        torch.testing.assert_close(cached.scores, plain.scores)


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_a_batch_gives_what_each_sentence_gives_alone(search: Any) -> None:
    model, src = sharp(3), batch((7, 2, 5, 1))
    together = search(model, src, **ENDS, max_len=10)
    for i, length in enumerate((7, 2, 5, 1)):
        alone = search(model, src[i : i + 1, :length], **ENDS, max_len=10)
        found = together.tokens[i]
        assert torch.equal(found[found != PAD], alone.tokens[0][alone.tokens[0] != PAD])
        torch.testing.assert_close(together.scores[i], alone.scores[0])


def log_probability(model: Seq2SeqTransformer, src: Tensor, tokens: tuple[int, ...]) -> float:
    """Of `tokens` after BOS, the forbidden ones left out of the distribution."""
    tgt = torch.tensor([[BOS, *tokens]])
    with torch.no_grad():
        logits = model(src, tgt[:, :-1], tgt_padding=torch.zeros(1, len(tokens), dtype=torch.bool))
    logits[..., [BOS, PAD]] = -torch.inf
    return float(logits.log_softmax(-1)[0].gather(-1, tgt[0, 1:, None]).sum())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_sentences(penalty: float, seed: int) -> None:
    model = sharp(seed, src_vocab=5)
    src, longest = torch.tensor([[3, 4, 3]]), 4
    scores = {}
    for length in range(1, longest + 1):
        for body in itertools.product((3, 4), repeat=length - 1):
            tokens = (*body, EOS)
            total = log_probability(model, src, tokens)
            scores[tokens] = total / ((5 + length) / 6) ** penalty
    for tokens in itertools.product((3, 4), repeat=longest):  # cut off
        scores[tokens] = log_probability(model, src, tokens) / ((5 + longest) / 6) ** penalty
    best = max(scores, key=scores.__getitem__)
    found = beam_search(model, src, **ENDS, max_len=longest, beams=24, length_penalty=penalty)
    assert tuple(found.tokens[0].tolist()) == best
    assert abs(float(found.scores[0]) - scores[best]) < 1e-5


def ends_early(seed: int) -> Seq2SeqTransformer:
    """A model that may end anywhere: the end is about as likely as any other token."""
    model = sharp(seed, src_vocab=5, tie_embeddings=False)
    with torch.no_grad():
        model.generator.weight.mul_(0.5)
        model.generator.weight[EOS] *= 3.0
    return model


def search_to_the_end(
    model: Seq2SeqTransformer, src: Tensor, longest: int, beams: int, penalty: float
) -> tuple[tuple[int, ...], float]:
    """Beam search in plain Python that never stops early."""
    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, longest + 1):
        tried = sorted(
            (
                (log_probability(model, src, (*tokens, token)), (*tokens, token))
                for _, tokens in alive
                for token in (3, 4, EOS)
            ),
            reverse=True,
        )
        scale = ((5 + length) / 6) ** penalty
        done += [(total / scale, y) for total, y in tried[:beams] if y[-1] == EOS]
        alive = [(total, y) for total, y in tried if y[-1] != EOS][:beams]
    cut = [(total / ((5 + longest) / 6) ** penalty, y) for total, y in alive]
    score, tokens = max(done + cut)
    return tokens, score


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_sentences_that_end_early_are_those_of_a_search_that_goes_on(penalty: float) -> None:
    src, lengths, longest = torch.tensor([[3, 4, 3]]), set(), 6
    for seed in range(6):
        model = ends_early(seed)
        found = beam_search(model, src, **ENDS, max_len=longest, beams=2, length_penalty=penalty)
        tokens, score = search_to_the_end(model, src, longest, 2, penalty)
        assert tuple(found.tokens[0].tolist()) == tokens
        assert abs(float(found.scores[0]) - score) < 1e-5
        lengths.add(len(tokens) if tokens[-1] == EOS else 0)
    assert lengths - {0}  # else the penalty and the early stop would decide nothing


def test_one_beam_without_penalty_is_greedy() -> None:
    for seed in range(5):
        model, src = sharp(seed), batch()
        greedy = greedy_search(model, src, **ENDS, max_len=9)
        beam = beam_search(model, src, **ENDS, max_len=9, beams=1, length_penalty=0.0)
        assert torch.equal(greedy.tokens, beam.tokens)
        torch.testing.assert_close(greedy.scores, beam.scores)


def test_greedy_scores_are_log_probabilities() -> None:
    model, src = sharp(1), batch((4,))
    tokens, scores = greedy_search(model, src, **ENDS, max_len=6)
    assert abs(float(scores[0]) - log_probability(model, src, tuple(tokens[0].tolist()))) < 1e-5


@pytest.mark.usefixtures("one_thread")
def test_greedy_scores_are_those_of_the_sentence_and_not_of_what_follows() -> None:
    src, lengths = torch.tensor([[3, 4, 3], [4, 4, 4], [3, 3, 4], [4, 3, 3]]), set()
    for seed in range(8):
        model = ends_early(seed)
        found = greedy_search(model, src, **ENDS, max_len=8)
        told = found.scores.tolist()
        of_batch = set()
        for row, tokens in enumerate(found.tokens.tolist()):
            end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
            of_batch.add(end)
            expected = log_probability(model, src[row : row + 1], tuple(tokens[:end]))
            assert abs(told[row] - expected) < 1e-5
        lengths.add(len(of_batch))
    assert max(lengths) > 1  # some sentences end while others go on


def test_what_is_never_chosen_and_what_follows_the_end() -> None:
    model, src = build(4).eval(), batch((5,) * 40)
    tokens = sample(model, src, **ENDS, max_len=20, temperature=5.0).tokens
    assert not bool((tokens == BOS).any())
    ended = (tokens == EOS).cumsum(1)
    assert bool((ended[:, -1] > 0).any())
    after = torch.nn.functional.pad(ended, (1, 0))[:, :-1] > 0
    assert torch.equal(tokens == PAD, after)


def test_sampling_follows_its_generator_and_the_distribution() -> None:
    model, src = build(0).eval(), batch((4,)).repeat(3000, 1)

    def first(**arguments: Any) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return sample(model, src, **ENDS, max_len=1, generator=generator, **arguments).tokens[:, 0]

    assert torch.equal(first(), first())
    logits = model.start(src[:1], 1).step(torch.tensor([BOS]))
    logits[:, [BOS, PAD]] = -torch.inf
    probability = logits.detach().softmax(-1)[0]
    share = torch.bincount(first(), minlength=V) / 3000
    # Five standard deviations of a share of 3000 draws are below 0.05.
    torch.testing.assert_close(share, probability, rtol=0, atol=0.05)
    assert first(temperature=1e-4).unique().tolist() == [int(probability.argmax())]
    assert first(top_k=1).unique().tolist() == [int(probability.argmax())]
    assert set(first(top_k=3).tolist()) == set(probability.topk(3).indices.tolist())


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_probability() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).log()
    for top_p, kept in (
        (0.4, [1, 1]),
        (0.45, [2, 1]),
        (0.8, [3, 1]),
        (0.975, [4, 2]),
        (1.0, [4, 4]),
    ):
        found = keep_likeliest(logits, None, top_p).isfinite()
        assert found.sum(-1).tolist() == kept, top_p
    assert keep_likeliest(logits, None, 0.45)[0].isfinite().tolist() == [False, True, True, False]


def test_stock_and_hooked_decoders_decode_without_caches() -> None:
    ours, stock = build(2).eval(), build(2, backend="torch").eval()
    src = batch()
    expected = greedy_search(ours, src, **ENDS, max_len=8)
    assert torch.equal(greedy_search(stock, src, **ENDS, max_len=8).tokens, expected.tokens)
    ours.transformer.decoder.layers[0].linear1.register_forward_hook(lambda *_: None)
    assert type(ours.start(src, 8)) is PlainDecoding
    for model in (ours, stock):
        with pytest.raises(ValueError, match="`use_cache` must not be True"):
            model.start(src, 8, use_cache=True)


def test_caches_do_not_depend_on_packing() -> None:
    model, src = build(2).eval(), batch()
    expected = greedy_search(model, src, **ENDS, max_len=8)
    for layer in model.transformer.decoder.layers:
        layer.pack_padding = False
    assert type(model.start(src, 8)) is CachedDecoding
    assert torch.equal(greedy_search(model, src, **ENDS, max_len=8).tokens, expected.tokens)


def test_an_empty_batch_gives_no_sentences() -> None:
    model, src = build().eval(), torch.zeros(0, 5, dtype=torch.int64)
    for search in (greedy_search, sample, beam_search):
        tokens, scores = search(model, src, **ENDS, max_len=4)
        assert tokens.shape[0] == scores.shape[0] == 0


@pytest.mark.parametrize(("search", "arguments", "message"), [
    (sample, {"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
    (sample, {"top_k": 0}, "`top_k` must be at least 1, got 0"),
    (sample, {"top_p": 1.5}, r"`top_p` must be in \(0, 1\], got 1.5"),
    (beam_search, {"beams": 0}, "`beams` must be at least 1, got 0"),
    (beam_search, {"length_penalty": -1.0}, "`length_penalty` must be at least 0, got -1.0"),
    (greedy_search, {"max_len": 99}, r"`max_len` must be in \[1, 24\], got 99"),
])  # fmt: skip
def test_mistakes_are_named(search: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(build(), batch(), **(ENDS | {"max_len": 4} | arguments))


def test_a_full_cache_says_so() -> None:
    model = build().eval()
    decoding = model.start(batch(), 2)
    token = torch.full((3,), BOS)
    decoding.step(token)
    decoding.step(token)
    with pytest.raises(ValueError, match="holds max_len=2 positions, got 3"):
        decoding.step(token)


def test_beams_end_before_the_longest_length_and_report_it() -> None:
    model = sharp(0, src_vocab=5)
    with torch.no_grad():
        model.tgt_embedding.embedding.weight[EOS] *= 3.0
    src = torch.tensor([[3, 4, 3], [4, 4, 0]])
    found = beam_search(model, src, **ENDS, max_len=20, beams=3)
    longest = (found.tokens != PAD).sum(1)
    assert int(longest.max()) == found.tokens.shape[1]


SEARCHES: dict[str, Any] = {
    "greedy": greedy_search,
    "sample": lambda *a, **k: sample(*a, **k, generator=torch.Generator().manual_seed(0)),
    "beam": beam_search,
    "one beam": lambda *a, **k: beam_search(*a, **k, beams=1),
    "more beams than tokens": lambda *a, **k: beam_search(*a, **k, beams=V + 3),
}


def ending(token: int) -> Seq2SeqTransformer:
    """A model that likes `token` best, whatever came before."""
    model = sharp(tie_embeddings=False)
    with torch.no_grad():
        model.generator.weight.zero_()
        model.generator.weight[token] = 1.0
        model.transformer.decoder.norm.weight.zero_()
        model.transformer.decoder.norm.bias.fill_(1.0)
    return model


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("eos", [PAD, BOS, EOS, 5])
def test_a_sentence_ends_whichever_token_ends_it(search: Any, eos: int) -> None:
    """GPT-2's end is its padding, BART's its beginning."""
    found = search(ending(eos), batch(), bos=BOS, eos=eos, max_len=9)
    ends = found.tokens == eos
    assert ends[:, 0].float().mean() > 0.5  # nearly always at once
    first = torch.where(ends.any(1), ends.long().argmax(1), found.tokens.shape[1])
    after = torch.arange(found.tokens.shape[1]) > first[:, None]
    assert (found.tokens[after] == PAD).all()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_each_of_several_tokens_ends_a_sentence(search: Any) -> None:
    for liked in (5, PAD, 7):
        found = search(ending(liked), batch(), bos=BOS, eos=[7, PAD, 5], max_len=9)
        first = found.tokens[:, 0]
        assert ((first == 5) | (first == PAD) | (first == 7)).float().mean() > 0.5


def test_several_ends_are_the_best_of_each() -> None:
    """By trying all: the best sentence that ends with either token."""
    model, src = sharp(3), batch((4,))
    alone = [beam_search(model, src, bos=BOS, eos=e, max_len=1, beams=V) for e in (2, 5)]
    both = beam_search(model, src, bos=BOS, eos=(2, 5), max_len=1, beams=V)
    assert both.scores >= max(a.scores for a in alone) - 1e-6


@pytest.mark.parametrize("search", [greedy_search, sample, beam_search])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"eos": V}, ValueError, r"`eos` must be in the vocabulary \[0, \d+\), got"),
        ({"eos": [2, V + 7]}, ValueError, r"`eos` must be in the vocabulary"),
        ({"eos": -1}, ValueError, "`eos` must be at least 0, got -1"),
        ({"eos": 2.0}, TypeError, "`eos` must be an int, got float 2.0"),
        ({"eos": ()}, ValueError, "`eos` must name at least one token"),
        ({"eos": None}, TypeError, "`eos` must be an int, got NoneType"),
        ({"bos": V}, ValueError, r"`bos` must be in the vocabulary"),
        ({"bos": True}, TypeError, "`bos` must be an int, got bool"),
        ({"max_len": 3.0}, TypeError, "`max_len` must be an int, got float"),
        ({"max_len": -1}, ValueError, "`max_len` must be at least 0"),
    ],
)
def test_wrong_tokens_and_lengths_are_named(
    search: Any, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"bos": BOS, "eos": EOS, "max_len": 4, **wrong}
    with pytest.raises(error, match=message):
        search(sharp(), batch(), **arguments)


@pytest.mark.parametrize("beams", [2.0, "4", None, True])
def test_beams_are_an_int(beams: Any) -> None:
    with pytest.raises(TypeError, match="`beams` must be an int, got"):
        beam_search(sharp(), batch(), **ENDS, max_len=3, beams=beams)


def test_no_source_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="`src` must be a tensor, got list"):
        greedy_search(sharp(), [[1, 2]], **ENDS, max_len=3)


def test_a_last_norm_that_looks_across_positions_decodes_without_caches() -> None:
    class Centred(torch.nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input - input.mean(dim=1, keepdim=True))

    model = sharp()
    model.transformer.decoder.norm = Centred(model.transformer.decoder.norm.normalized_shape[0])
    model = model.double().eval()
    assert type(model.start(batch(), 4)) is PlainDecoding
