"""Search that follows one hypothesis a sentence: the likeliest next token, or a drawn one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..runtime import checks
from .decoder_only import DecoderOnly
from .decoding import Decoding

EndTokens = int | Sequence[int]


class Model(Protocol):
    """What the searches need of a model; `Seq2SeqTransformer` and `DecoderOnly` are ones."""

    padding_idx: int | None

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
    model: Model | Callable[..., Tensor],
    src: Tensor,
    *,
    bos: int | None = None,
    eos: EndTokens,
    max_len: int,
    use_cache: bool | None = None,
) -> Generated:
    """The likeliest token after each other.

    Args:
        model: a `Seq2SeqTransformer`, a `DecoderOnly`, or a plain callable, which is taken as
            `DecoderOnly(model)`; in eval mode, or its dropout acts.
        src: (N, S) int64, padded with `model.padding_idx`: the source, or of a decoder-only model
            the prompts, with padding at either end.
        bos: the token that begins a sentence; None for decoder-only models, which go on with the
            prompt.
        eos: the token that ends it, or several of which each does. `bos` and the padding are never
            chosen, unless they are among these (GPT-2 pads with its `eos`, BART begins with it).
        max_len: longest sentence, `eos` included.
        use_cache: as of `Seq2SeqTransformer.start`.

    Raises:
        TypeError: `src` is no tensor of integers, or a number no int.
        ValueError: `bos` or `eos` is outside the vocabulary, `bos` is missing or too much,
            `max_len` does not suit the model, or it cannot use a cache.
    """
    return _follow(model, src, bos, eos, max_len, use_cache, lambda logits: logits.argmax(-1))


@torch.no_grad()
def sample(
    model: Model | Callable[..., Tensor],
    src: Tensor,
    *,
    bos: int | None = None,
    eos: EndTokens,
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
        TypeError, ValueError: one of these is out of range; or as `greedy_search`.
    """
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if top_k is not None:
        checks.expect_integer("top_k", top_k, 1)
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


def check_call(src: Tensor, bos: int | None, eos: EndTokens, max_len: int) -> tuple[int, ...]:
    """The tokens that end a sentence, after a look at what all searches take.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    checks.expect_rank("src", src, 2, "(N, S)")
    if bos is not None:
        checks.expect_integer("bos", bos, 0)
    checks.expect_integer("max_len", max_len, 0)
    ends = tuple(eos) if isinstance(eos, Sequence) else (eos,)
    if not ends:
        raise ValueError("`eos` must name at least one token, got none")
    for token in ends:
        checks.expect_integer("eos", token, 0)
    return ends


def expect_in_vocabulary(name: str, tokens: tuple[int, ...], vocab: int) -> None:
    """Raises ValueError for a token that the model has no logit of."""
    for token in tokens:
        if not 0 <= token < vocab:
            raise ValueError(f"`{name}` must be in the vocabulary [0, {vocab}), got {token}")


def vocabulary(model: Any) -> int | None:
    """Number of target tokens, where the model says so."""
    return getattr(model, "tgt_vocab", None)


def never_chosen(bos: int | None, ends: tuple[int, ...], padding: int | None) -> tuple[int, ...]:
    """Tokens that are no part of a sentence."""
    return tuple(token for token in (bos, padding) if token is not None and token not in ends)


def begin(
    model: Any, src: Tensor, bos: int | None, max_len: int, beams: int, use_cache: bool | None
) -> tuple[Decoding, Tensor, int | None]:
    """The decoding, the token (N * beams,) that each of its sentences begins with, the padding.

    Raises:
        ValueError: `bos` is missing, or given to a model that goes on with a prompt.
    """
    if not hasattr(model, "start"):
        model = DecoderOnly(model, getattr(model, "padding_idx", None))
    goes_on = isinstance(model, DecoderOnly)
    if goes_on and bos is not None:
        raise ValueError("`bos` must be None for a decoder-only model: `src` is its prompt")
    if not goes_on and bos is None:
        raise ValueError("`bos` must be the token that begins a sentence, got None")
    decoding = model.start(src, max_len, beams, use_cache)
    first = getattr(decoding, "last", None)
    if first is None:
        rows = src.shape[0] * beams
        first = torch.full((rows,), bos or 0, dtype=torch.int64, device=src.device)
    return decoding, first, model.padding_idx


def is_end(tokens: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Which of `tokens` end a sentence: bool of their shape."""
    found = tokens == ends[0]
    for token in ends[1:]:
        found = found | (tokens == token)
    return found


def _follow(
    model: Any,
    src: Tensor,
    bos: int | None,
    eos: EndTokens,
    max_len: int,
    use_cache: bool | None,
    choose: Callable[[Tensor], Tensor],
) -> Generated:
    """`choose`: logits (N, V) -> tokens (N,)."""
    ends = check_call(src, bos, eos, max_len)
    if (vocab := vocabulary(model)) is not None:
        expect_in_vocabulary("bos", () if bos is None else (bos,), vocab)
        expect_in_vocabulary("eos", ends, vocab)
    decoding, last, padding = begin(model, src, bos, max_len, 1, use_cache)
    batch, filler = src.shape[0], ends[0] if padding is None else padding
    forbidden = never_chosen(bos, ends, padding)
    finished = torch.zeros(batch, dtype=torch.bool, device=src.device)
    scores = torch.zeros(batch, dtype=torch.float64, device=src.device)
    tokens: list[Tensor] = []
    while len(tokens) < max_len and not bool(finished.all()):
        logits = forbid(decoding.step(last), forbidden)
        expect_in_vocabulary("eos", ends, logits.shape[-1])
        last = choose(logits)
        gained = logits.log_softmax(-1).gather(-1, last[:, None])[:, 0]
        scores += torch.where(finished, 0.0, gained)
        last = torch.where(finished, filler, last)
        finished = finished | is_end(last, ends)
        tokens.append(last)
    found = torch.stack(tokens, dim=1) if tokens else src.new_empty(batch, 0)
    return Generated(found, scores.float())
