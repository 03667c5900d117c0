"""Language models of one's own in the searches: any callable from tokens to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modules.cache import reorder_all
from ..runtime import checks
from .decoding import Decoding


class DecoderOnly:
    """A decoder-only model as the searches take it; they wrap a plain callable themselves.

    The model is called in one of these ways, `key_padding_mask` only where a prompt is padded::

        logits = model(tokens)                                     # all tokens so far, each step
        logits = model(tokens, cache=cache)                        # those not in the cache yet
        logits = model(tokens, key_padding_mask=mask, cache=cache)

    tokens is (N, L) int64, logits (N, L, V). `mask` (N, S) bool is True at padding, of all
    positions up to the last token: what `FusedTransformerEncoder` calls `src_key_padding_mask`.

    Args:
        model: the callable.
        padding_idx: the token that fills up prompts of unequal length, at either end, and found
            sentences; None: prompts have one length.
        new_cache: called with the positions that are needed, gives an empty cache: anything with
            `reorder(rows)`, or a list or dictionary of such. Taken from the model's own `new_cache`
            if None; without one each step computes all positions again.

    Raises:
        TypeError: `model` cannot be called.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        padding_idx: int | None = None,
        new_cache: Callable[[int], Any] | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be callable, got {checks.type_name(model)}")
        self.model = model
        self.padding_idx = padding_idx
        self.new_cache = new_cache or getattr(model, "new_cache", None)

    def start(
        self, src: Tensor, max_len: int, beams: int = 1, use_cache: bool | None = None
    ) -> Decoding:
        """Get ready to go on with each prompt of `src` (N, S), `beams` times.

        Raises:
            ValueError: a prompt has no token, or a cache was asked for and there is none.
        """
        if use_cache and self.new_cache is None:
            raise ValueError(
                "`use_cache` must not be True: the model has no `new_cache(max_len)`, and none was "
                "given to `DecoderOnly`"
            )
        prompt, padding = left_padded(src, self.padding_idx)
        if prompt.shape[1] == 0:
            raise ValueError("`src` must hold at least one token a prompt, got none")
        cache = None
        if use_cache is not False and self.new_cache is not None:
            cache = self.new_cache(prompt.shape[1] + max_len)
        return Prompts(self.model, prompt, padding, beams, cache)


def left_padded(tokens: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor | None]:
    """The prompts with all of their padding in front, and where it is (None: nowhere).

    Raises:
        ValueError: a prompt is nothing but padding.
    """
    if padding_idx is None or tokens.numel() == 0:
        return tokens, None
    padding = tokens == padding_idx
    if not bool(padding.any()):
        return tokens, None
    # A prompt may hold the padding's token itself (GPT-2 pads with its end): only ends count.
    real = ~padding
    seen = real.cumsum(1) > 0
    follows = real.flip(1).cumsum(1).flip(1) > 0
    padding = ~(seen & follows)
    if bool(padding.all(dim=1).any()):
        raise ValueError(f"`src` must hold a token other than the padding {padding_idx} a prompt")
    behind = (padding & seen).sum(1)
    size = tokens.shape[1]
    place = (torch.arange(size, device=tokens.device) - behind[:, None]) % size
    return tokens.gather(1, place), padding.gather(1, place)


class Prompts:
    """Prompts that are gone on with, token by token.

    Attributes:
        last: (N,) int64, the last token of each prompt, with which the first step begins.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        prompt: Tensor,
        padding: Tensor | None,
        beams: int,
        cache: Any,
    ) -> None:
        self._model = model
        self._cache = cache
        self._beams = beams
        self._tokens = prompt[:, :-1]  # so far, without the last one
        self._padding = padding
        self.last = prompt[:, -1].repeat_interleave(beams)
        self._begun = False

    def step(self, tokens: Tensor) -> Tensor:
        """As `Decoding.step`."""
        if not self._begun and self._beams > 1:
            return self._first_of_beams(tokens)
        self._tokens = torch.cat([self._tokens, tokens[:, None]], dim=1)
        new = self._tokens if self._cache is None or not self._begun else tokens[:, None]
        self._begun = True
        return self._call(new)

    def reorder(self, rows: Tensor) -> None:
        """As `Decoding.reorder`."""
        self._tokens = self._tokens.index_select(0, rows)
        if self._padding is not None:
            self._padding = self._padding.index_select(0, rows)
        if self._cache is not None:
            reorder_all(self._cache, rows)

    def _first_of_beams(self, tokens: Tensor) -> Tensor:
        """The prompts once, and their logits for each of their beams."""
        beams, self._beams = self._beams, 1
        logits = self.step(tokens[::beams])
        rows = torch.arange(len(tokens) // beams, device=tokens.device).repeat_interleave(beams)
        self.reorder(rows)
        return logits.index_select(0, rows)

    def _call(self, new: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self._cache is not None:
            options["cache"] = self._cache
        if self._padding is not None:
            grown = self._tokens.shape[1] - self._padding.shape[1]
            self._padding = torch.nn.functional.pad(self._padding, (0, grown), value=False)
            options["key_padding_mask"] = self._padding
        logits = self._model(new, **options)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != new.shape:
            raise ValueError(
                f"the model must return logits (N, L, V) with (N, L) = {tuple(new.shape)}, got "
                + (
                    str(tuple(logits.shape))
                    if isinstance(logits, Tensor)
                    else type(logits).__name__
                )
            )
        return logits[:, -1]
