"""Beam search over a batch of sentences, with a length penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime import checks
from .search import (
    EndTokens,
    Generated,
    Model,
    begin,
    check_call,
    expect_in_vocabulary,
    forbid,
    is_end,
    never_chosen,
    vocabulary,
)


@dataclass
class _Hypotheses:
    """Of N sentences, B each."""

    tokens: Tensor  # (N, B, L)
    scores: Tensor  # (N, B); -inf where there is none

    def best_of(self, count: int) -> _Hypotheses:
        scores, index = self.scores.topk(count, dim=1)
        return _Hypotheses(_take(self.tokens, index), scores)


@torch.no_grad()
def beam_search(
    model: Model | Callable[..., Tensor],
    src: Tensor,
    *,
    bos: int | None = None,
    eos: EndTokens,
    max_len: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    use_cache: bool | None = None,
) -> Generated:
    """The best sentence of those that `beams` hypotheses a source lead to.

    The score of a sentence y is log P(y) / ((5 + |y|) / 6)^length_penalty, `eos` counted (Wu et al.
    2016, "Google's Neural Machine Translation System", equation 14, without coverage). A
    hypothesis ends with `eos` if that puts it among the best `beams`; at `max_len` those that go on
    are judged as they are. The search ends when no hypothesis can overtake the best ended one.

    Args:
        model, src, bos, eos, max_len, use_cache: as of `greedy_search`.
        beams: hypotheses a sentence.
        length_penalty: 0 and above; the larger, the longer the sentences.

    Raises:
        ValueError: `beams` or `length_penalty` is out of range; or as `greedy_search`.
    """
    ends = check_call(src, bos, eos, max_len)
    checks.expect_integer("beams", beams, 1)
    if (vocab := vocabulary(model)) is not None:
        expect_in_vocabulary("bos", () if bos is None else (bos,), vocab)
        expect_in_vocabulary("eos", ends, vocab)
    if not 0.0 <= length_penalty < math.inf:
        raise ValueError(f"`length_penalty` must be at least 0, got {length_penalty}")
    batch, device = src.shape[0], src.device
    if batch == 0:
        return Generated(src.new_empty(0, 0), torch.zeros(0, device=device))
    decoding, first, padding = begin(model, src, bos, max_len, beams, use_cache)
    filler = ends[0] if padding is None else padding
    forbidden = never_chosen(bos, ends, padding)
    # Only the first of the equal hypotheses counts at the start.
    scores = torch.full((batch, beams), -torch.inf, dtype=torch.float64, device=device)
    ended = _Hypotheses(src.new_empty(batch, beams, 0), scores)
    alive = _Hypotheses(first.view(batch, beams, 1), scores.clone())
    alive.scores[:, 0] = 0.0
    for length in range(1, max_len + 1):
        logits = forbid(decoding.step(alive.tokens[:, :, -1].flatten()), forbidden)
        expect_in_vocabulary("eos", ends, logits.shape[-1])
        alive, ended, rows = _advance(
            alive, ended, logits, ends, _penalty(length, length_penalty), filler
        )
        # Scores fall from token to token, and the penalty divides by most at the end.
        reachable = alive.scores[:, 0] / _penalty(max_len, length_penalty)
        if bool((ended.scores[:, 0] >= reachable).all()):
            break
        decoding.reorder(rows)
    return _finish(alive, ended, _penalty(max_len, length_penalty), ends)


def _penalty(length: int, power: float) -> float:
    return ((5.0 + length) / 6.0) ** power


def _advance(
    alive: _Hypotheses,
    ended: _Hypotheses,
    logits: Tensor,
    eos: tuple[int, ...],
    penalty: float,
    padding: int,
) -> tuple[_Hypotheses, _Hypotheses, Tensor]:
    """One token more: those alive, those ended, and the row (N * B,) that each alive comes from."""
    batch, beams = alive.scores.shape
    vocab = logits.shape[-1]
    gained = logits.double().log_softmax(-1).view(batch, beams, vocab)
    scores = (alive.scores[:, :, None] + gained).flatten(1)
    # Enough stay alive though every hypothesis may end in each of the ways that there are.
    scores, index = scores.topk(min((1 + len(eos)) * beams, scores.shape[1]), dim=1)
    origin, token = index // vocab, index % vocab
    tokens = torch.cat([_take(alive.tokens, origin), token[:, :, None]], dim=2)
    ends = is_end(token, eos)
    among_best = torch.arange(index.shape[1], device=index.device) < beams
    grown = torch.nn.functional.pad(ended.tokens, (0, 1), value=padding)
    ended = _Hypotheses(
        torch.cat([grown, tokens[:, :, 1:]], dim=1),
        torch.cat(
            [ended.scores, (scores / penalty).masked_fill(~(ends & among_best), -torch.inf)], dim=1
        ),
    ).best_of(beams)
    scores = scores.masked_fill(ends, -torch.inf)
    if scores.shape[1] < beams:  # a vocabulary that small leaves fewer ways to go on
        missing = beams - scores.shape[1]
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        origin = torch.nn.functional.pad(origin, (0, missing))
        tokens = torch.cat([tokens, tokens[:, :1].expand(-1, missing, -1)], dim=1)
    scores, chosen = scores.topk(beams, dim=1)
    rows = origin.gather(1, chosen) + torch.arange(batch, device=index.device)[:, None] * beams
    return _Hypotheses(_take(tokens, chosen), scores), ended, rows.flatten()


def _finish(
    alive: _Hypotheses, ended: _Hypotheses, penalty: float, eos: tuple[int, ...]
) -> Generated:
    """The best of those that ended and those that are cut off."""
    best = _Hypotheses(
        torch.cat([ended.tokens, alive.tokens[:, :, 1:]], dim=1),
        torch.cat([ended.scores, alive.scores / penalty], dim=1),
    ).best_of(1)
    tokens = best.tokens[:, 0]
    end = is_end(tokens, eos)
    lengths = torch.where(end.any(dim=1), end.long().argmax(dim=1) + 1, tokens.shape[1])
    longest = int(lengths.max())
    return Generated(tokens[:, :longest], best.scores[:, 0].float())


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (N, B, L), index (N, K) -> (N, K, L)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
