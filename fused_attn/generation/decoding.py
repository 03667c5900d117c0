"""Decoding token by token: with keys and values kept between the steps, or everything again."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..modules.cache import KeyValueCache, LayerCache
from ..modules.decoder_layer import FusedTransformerDecoderLayer
from ..modules.linear import call_linear
from ..modules.residual import has_hooks
from ..modules.stacks import FusedTransformerDecoder


class Model(Protocol):
    """What is asked here of a `Seq2SeqTransformer`, which calls this file."""

    padding_idx: int

    @property
    def transformer(self) -> nn.Transformer: ...

    @property
    def tgt_embedding(self) -> nn.Module: ...

    @property
    def generator(self) -> nn.Module: ...

    def encode(self, src: Tensor, src_padding: Tensor | None = None) -> Tensor: ...

    def decode(self, tgt: Tensor, memory: Tensor, src_padding: Tensor | None = None) -> Tensor: ...


class Decoding(Protocol):
    """Sentences that are being decoded."""

    def step(self, tokens: Tensor) -> Tensor:
        """The latest token of each sentence (N,) int64 -> logits of the next one (N, V)."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Go on with sentence `rows[i]` as sentence i; rows (N,) int64.

        Sentences may change places only among those that share a source.
        """
        ...


def start(model: Model, src: Tensor, max_len: int, beams: int, use_cache: bool | None) -> Decoding:
    """As `Seq2SeqTransformer.start`."""
    possible = _is_cacheable(model.transformer.decoder)
    if use_cache and not possible:
        raise ValueError(
            "`use_cache` must not be True: the decoder is torch.nn's, or a module in it has hooks "
            "or was replaced"
        )
    padding = src == model.padding_idx
    memory = model.encode(src, padding)
    if use_cache is False or not possible:
        return PlainDecoding(model, memory, padding, beams)
    return CachedDecoding(model, memory, padding, max_len)


def _is_cacheable(decoder: Any) -> bool:
    return (
        type(decoder) is FusedTransformerDecoder
        and not has_hooks(decoder)
        and decoder.has_known_norm()  # another one may look at all positions
        and all(
            type(layer) is FusedTransformerDecoderLayer and layer.is_cacheable()
            for layer in decoder.layers
        )
    )


class CachedDecoding:
    """Each step computes one position; keys and values of the others come from caches."""

    def __init__(
        self,
        model: Model,
        memory: Tensor,
        padding: Tensor,
        max_len: int,
    ) -> None:
        self._model = model
        self._decoder: Any = model.transformer.decoder
        self._padding = padding
        self._layers = []
        for layer in self._decoder.layers:
            cache = LayerCache(KeyValueCache(max_len))
            cache.memory.k, cache.memory.v = layer.multihead_attn.project_memory(memory)
            self._layers.append(cache)
        self._position = 0

    def step(self, tokens: Tensor) -> Tensor:
        """As `Decoding.step`."""
        x = self._model.tgt_embedding(tokens[:, None], self._position)
        for layer, cache in zip(self._decoder.layers, self._layers, strict=True):
            x = layer.forward_cached(x, cache, self._padding)
        if self._decoder.norm is not None:
            x = self._decoder.norm(x)
        self._position += 1
        return call_linear(self._model.generator, x[:, 0])

    def reorder(self, rows: Tensor) -> None:
        """As `Decoding.reorder`; the memory stays, since sentences that change places share it."""
        for cache in self._layers:
            cache.own.reorder(rows)


class PlainDecoding:
    """Each step computes all positions again; works with any decoder."""

    def __init__(self, model: Model, memory: Tensor, padding: Tensor, beams: int) -> None:
        self._model = model
        self._memory = memory.repeat_interleave(beams, dim=0)
        self._padding = padding.repeat_interleave(beams, dim=0)
        shape = (self._memory.shape[0], 0)
        self._tokens = torch.empty(shape, dtype=torch.int64, device=memory.device)

    def step(self, tokens: Tensor) -> Tensor:
        """As `Decoding.step`."""
        self._tokens = torch.cat([self._tokens, tokens[:, None]], dim=1)
        x = self._model.decode(self._tokens, self._memory, self._padding)
        return call_linear(self._model.generator, x[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """As `Decoding.reorder`."""
        self._tokens = self._tokens.index_select(0, rows)
