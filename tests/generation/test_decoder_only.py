"""Searches of decoder-only models: with and without a cache, padded at either end."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import fused_attn

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model"
PAD, END = 0, 1


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        sys.modules.pop("model", None)
        made = importlib.import_module("model")
        torch.manual_seed(0)
        model = made.LanguageModel(20, width=32, heads=4, feed_forward=48)
        sys.modules.pop("model", None)
    return model.eval()


SEARCHES = {
    "greedy": lambda *a, **k: fused_attn.greedy_search(*a, **k),
    "beam": lambda *a, **k: fused_attn.beam_search(*a, **k, beams=3),
    "sample": lambda *a, **k: fused_attn.sample(
        *a, **k, top_k=5, generator=torch.Generator().manual_seed(3)
    ),
}
PROMPTS = [[5, 7, 9, 2], [3, 8], [4, 4, 6]]


def padded(side):
    longest = max(map(len, PROMPTS))
    fill = [[PAD] * (longest - len(p)) for p in PROMPTS]
    rows = [f + p if side == "left" else p + f for p, f in zip(PROMPTS, fill, strict=True)]
    return torch.tensor(rows)


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_padded_prompts_give_what_each_gives_alone(model, search):
    run = SEARCHES[search]
    wrapped = fused_attn.DecoderOnly(model, padding_idx=PAD)
    options = {"eos": END, "max_len": 8}
    alone = [run(wrapped, torch.tensor([p]), **options).tokens[0].tolist() for p in PROMPTS]
    for side in ("left", "right"):
        for use_cache in (True, False):
            found = run(wrapped, padded(side), **options, use_cache=use_cache)
            for row, wanted in zip(found.tokens.tolist(), alone, strict=True):
                assert row[: len(wanted)] == wanted, (side, use_cache)
                assert set(row[len(wanted) :]) <= {PAD}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_cache_changes_nothing(model, search):
    prompt = torch.tensor([[5, 7, 9], [2, 3, 4]])
    with_cache, without = (
        SEARCHES[search](model, prompt, eos=[END, 19], max_len=10, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache.tokens, without.tokens)
    torch.testing.assert_close(with_cache.scores, without.scores)


def test_beams_find_the_best_of_all_short_sentences(model):
    """Every sentence of two tokens, scored one by one."""
    prompt = torch.tensor([[5, 7, 9]])
    found = fused_attn.beam_search(model, prompt, eos=END, max_len=2, beams=20, length_penalty=0.0)
    scores = {}
    with torch.no_grad():
        first = model(prompt)[0, -1].log_softmax(-1)
        for a in range(20):
            if a == END:
                scores[(a,)] = first[a].item()
                continue
            second = model(torch.tensor([[5, 7, 9, a]]))[0, -1].log_softmax(-1)
            scores |= {(a, b): (first[a] + second[b]).item() for b in range(20)}
    best = max(scores, key=scores.__getitem__)
    assert tuple(found.tokens[0].tolist()) == best
    assert found.scores[0].item() == pytest.approx(scores[best], abs=1e-5)


def test_only_the_new_tokens_are_computed(model):
    sizes = []

    def counted(tokens, cache):
        sizes.append(tokens.shape)
        return model(tokens, cache=cache)

    wrapped = fused_attn.DecoderOnly(counted, new_cache=model.new_cache)
    prompt = torch.tensor([[5, 7, 9], [2, 3, 4]])
    fused_attn.beam_search(wrapped, prompt, eos=END, max_len=4, beams=3)
    assert sizes[0] == (2, 3), "the prompts once, not once a beam"
    assert set(sizes[1:]) == {(6, 1)}


def test_any_callable_will_do():
    def next_number(tokens):
        logits = torch.full((*tokens.shape, 8), -9.0)
        return logits.scatter(-1, ((tokens + 1) % 8)[..., None], 9.0)

    found = fused_attn.greedy_search(next_number, torch.tensor([[2], [5]]), eos=7, max_len=6)
    assert found.tokens.tolist() == [[3, 4, 5, 6, 7], [6, 7, 7, 7, 7]]


def test_a_paged_cache_in_a_search(model):
    prompt = torch.tensor([[5, 7, 9], [2, 3, 4]])
    paged = fused_attn.DecoderOnly(
        model, new_cache=lambda max_len: model.stack.new_cache(max_len, page_size=2)
    )
    wanted, found = (
        fused_attn.beam_search(m, prompt, eos=END, max_len=9, beams=4) for m in (model, paged)
    )
    assert torch.equal(wanted.tokens, found.tokens)


def test_the_example_trains_and_writes(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("model", "generate"):
        sys.modules.pop(name, None)
    importlib.import_module("generate").main(["--steps", "3", "--max-len", "5"])
    said = capsys.readouterr().out
    assert "greedy: def " in said
    assert "with cache" in said
    for name in ("model", "generate"):
        sys.modules.pop(name, None)


P = torch.tensor([[5, 7, 9]])
MISTAKES = {
    "bos": (
        lambda m: fused_attn.greedy_search(m, P, bos=2, eos=END, max_len=3),
        "`bos` must be No",
    ),
    "no bos": (
        lambda m: fused_attn.greedy_search(
            fused_attn.Seq2SeqTransformer(9, d_model=8, nhead=2), P, eos=1, max_len=3
        ),
        "`bos` must be the token",
    ),
    "no cache": (
        lambda m: fused_attn.greedy_search(lambda t: m(t), P, eos=END, max_len=3, use_cache=True),
        "`use_cache` must not be True",
    ),
    "an empty prompt": (
        lambda m: fused_attn.greedy_search(m, P[:, :0], eos=END, max_len=3),
        "at least one token",
    ),
    "nothing but padding": (
        lambda m: fused_attn.greedy_search(
            fused_attn.DecoderOnly(m, PAD), torch.tensor([[0, 0], [4, 2]]), eos=END, max_len=3
        ),
        "other than the padding 0",
    ),
    "one logit a prompt": (
        lambda m: fused_attn.greedy_search(lambda t: m(t)[:, -1], P, eos=END, max_len=3),
        r"logits \(N, L, V\)",
    ),
    "an end outside": (
        lambda m: fused_attn.greedy_search(m, P, eos=99, max_len=3),
        "`eos` must be in the vocabulary",
    ),
    "nothing to call": (lambda m: fused_attn.greedy_search(3, P, eos=END, max_len=3), "callable"),
    "a cache that cannot be reordered": (
        lambda m: fused_attn.beam_search(
            fused_attn.DecoderOnly(lambda t, cache: m(t), new_cache=lambda n: 5),
            P,
            eos=END,
            max_len=3,
        ),
        "`reorder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(model, name):
    call, words = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call(model)
