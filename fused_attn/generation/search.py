"""Search that follows one hypothesis a sentence: the likeliest next token, or a drawn one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .decoding import Decoding


class Model(Protocol):
    """What the searches need of a model; `Seq2SeqTransformer` is one."""

    padding_idx: int

    def start(
        self, src: Tensor, max_len: int, beams: int = 1, use_cache: bool | None = None
    ) -> Decoding:
        """Encode `src` (N, S) and get ready to decode N * beams sentences."""
        ...


class Generated(NamedTuple):
    """Sentences found.

    Attributes:
        tokens: (N, L) int64, without the first token, with `eos` where it was reached, filled up
            with the padding.
        scores: (N,) log-probability of the tokens; of `beam_search`, over the length penalty.
    """

    tokens: Tensor
    scores: Tensor


@torch.no_grad()
def greedy_search(
    model: Model, src: Tensor, *, bos: int, eos: int, max_len: int, use_cache: bool | None = None
) -> Generated:
    """The likeliest token after each other.

    Args:
        model: in eval mode, or its dropout acts.
        src: (N, S) int64, padded with `model.padding_idx`.
        bos, eos: the tokens that begin and end a sentence; `bos` and the padding are never chosen.
        max_len: longest sentence, `eos` included.
        use_cache: as of `Seq2SeqTransformer.start`.

    Raises:
        ValueError: `max_len` does not suit the model, or it cannot use a cache.
    """
    return _follow(model, src, bos, eos, max_len, use_cache, lambda logits: logits.argmax(-1))


@torch.no_grad()
def sample(
    model: Model,
    src: Tensor,
    *,
    bos: int,
    eos: int,
    max_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool | None = None,
) -> Generated:
    """Tokens drawn from the model's distribution.

    Args:
        model, src, bos, eos, max_len, use_cache: as of `greedy_search`.
        temperature: divides the logits; above 0.
        top_k: draw among the k likeliest tokens.
        top_p: draw among the likeliest tokens that together reach this probability, the one that
            reaches it included (Holtzman et al. 2019, "nucleus sampling"); after `top_k`.
        generator: source of randomness, on the device of `src`; torch's own if None.

    Raises:
        ValueError: one of these is out of range.
    """
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}")

    def draw(logits: Tensor) -> Tensor:
        kept = keep_likeliest(logits / temperature, top_k, top_p)
        return torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]

    return _follow(model, src, bos, eos, max_len, use_cache, draw)


def keep_likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """`logits` (N, V) with -inf for every token that `sample` must not draw."""
    if top_k is not None and top_k < logits.shape[-1]:
        chosen = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, chosen.indices, chosen.values)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return logits


def forbid(logits: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """`logits` (N, V) in float32 at least, with -inf for `tokens`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    logits[:, list(tokens)] = -torch.inf
    return logits


def _follow(
    model: Model,
    src: Tensor,
    bos: int,
    eos: int,
    max_len: int,
    use_cache: bool | None,
    choose: Callable[[Tensor], Tensor],
) -> Generated:
    """`choose`: logits (N, V) -> tokens (N,)."""
    decoding = model.start(src, max_len, use_cache=use_cache)
    batch, padding = src.shape[0], model.padding_idx
    last = torch.full((batch,), bos, dtype=torch.int64, device=src.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=src.device)
    scores = torch.zeros(batch, dtype=torch.float64, device=src.device)
    tokens: list[Tensor] = []
    while len(tokens) < max_len and not bool(finished.all()):
        logits = forbid(decoding.step(last), (bos, padding))
        last = choose(logits)
        gained = logits.log_softmax(-1).gather(-1, last[:, None])[:, 0]
        scores += torch.where(finished, 0.0, gained)
        last = torch.where(finished, padding, last)
        finished = finished | (last == eos)
        tokens.append(last)
    found = torch.stack(tokens, dim=1) if tokens else src.new_empty(batch, 0)
    return Generated(found, scores.float())
