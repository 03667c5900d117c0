"""The whole model of "Attention Is All You Need" (Vaswani et al. 2017): tokens in, logits out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.children import Activation
from ..modules.embedding import FusedTransformerEmbedding, TransformerEmbedding
from ..modules.linear import call_linear
from ..modules.positions import check_rotary
from ..modules.scripting import NotScriptable
from ..modules.stacks import FusedTransformer
from . import decoding
from .decoding import Decoding

BACKENDS = ("fused", "torch")


class Seq2SeqTransformer(NotScriptable, nn.Module):
    """Embeddings, encoder and decoder stacks, and the projection to the target vocabulary.

    `backend="torch"` builds the same model of stock torch.nn modules: the same seed gives the same
    parameters, and the state_dicts are interchangeable.

    Args:
        src_vocab: tokens of the source.
        tgt_vocab: tokens of the target; None: one vocabulary and one embedding for both sides.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward: sizes, and
        dropout, activation, layer_norm_eps, norm_first, bias: all as of `torch.nn.Transformer`.
        padding_idx: the token that fills up sequences of unequal length.
        max_len: number of positions.
        positions: "sinusoidal", "learned", or "rotary" (in the self-attentions, fused only).
        rotary_base: of "rotary".
        tie_embeddings: the output projection has the target embedding's weight.
        backend: "fused" or "torch".

    Attributes:
        src_embedding, tgt_embedding: one module if the vocabulary is shared.
        transformer: `FusedTransformer`, or `torch.nn.Transformer`.
        generator: `nn.Linear` without bias, d_model -> target vocabulary.

    Raises:
        ValueError: `backend` or `positions` is unknown, or "rotary" is asked of torch.nn.

    Shape legend: N batch, S source tokens, L target tokens.
    """

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int | None = None,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        *,
        padding_idx: int = 0,
        max_len: int = 512,
        positions: str = "sinusoidal",
        rotary_base: float = 10000.0,
        tie_embeddings: bool = True,
        backend: str = "fused",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            known = " or ".join(map(repr, BACKENDS))
            raise ValueError(f"`backend` must be {known}, got {backend!r}")
        if positions == "rotary" and backend == "torch":
            raise ValueError(
                "`positions` must not be 'rotary' on torch.nn, which has no such thing"
            )
        self.backend, self.padding_idx, self.max_len = backend, padding_idx, max_len
        self.tgt_vocab = tgt_vocab or src_vocab
        fused = backend == "fused"
        embedding_class = FusedTransformerEmbedding if fused else TransformerEmbedding
        added = "none" if positions == "rotary" else positions
        shared: Any = {"device": device, "dtype": dtype}

        def make_embedding(vocab: int) -> TransformerEmbedding:
            return embedding_class(vocab, d_model, padding_idx, max_len, added, dropout, **shared)

        self.src_embedding = make_embedding(src_vocab)
        self.tgt_embedding = self.src_embedding if tgt_vocab is None else make_embedding(tgt_vocab)
        transformer_class = FusedTransformer if fused else nn.Transformer
        with warnings.catch_warnings():
            # Of torch's inference fast path, which pre-norm layers do not have.
            warnings.filterwarnings("ignore", "enable_nested_tensor is True")
            self.transformer = transformer_class(
                d_model,
                nhead,
                num_encoder_layers,
                num_decoder_layers,
                dim_feedforward,
                dropout,
                activation,
                layer_norm_eps=layer_norm_eps,
                batch_first=True,
                norm_first=norm_first,
                bias=bias,
                **shared,
            )
        if positions == "rotary":
            base = check_rotary(rotary_base, d_model // nhead)
            stacks: Any = (self.transformer.encoder, self.transformer.decoder)
            for layer in (layer for stack in stacks for layer in stack.layers):
                layer.self_attn.rotary_base = base
        self.generator = nn.Linear(d_model, tgt_vocab or src_vocab, bias=False, **shared)
        nn.init.xavier_uniform_(self.generator.weight)
        if tie_embeddings:
            self.generator.weight = self.tgt_embedding.embedding.weight

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_padding: Tensor | None = None,
        tgt_padding: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each token of `tgt`.

        Args:
            src: (N, S) int64. tgt: (N, L) int64, starting with the token that begins a sentence.
            src_padding, tgt_padding: (N, S) and (N, L) bool, True = padding; where the tokens are
                `padding_idx` if None.

        Returns:
            (N, L, target vocabulary); any finite number at the padding of `tgt`.

        Raises:
            ValueError: a sequence is longer than max_len.
        """
        src_padding = self._padding(src, src_padding)
        tgt_padding = self._padding(tgt, tgt_padding)
        memory = self.encode(src, src_padding)
        return call_linear(self.generator, self.decode(tgt, memory, src_padding, tgt_padding))

    def encode(self, src: Tensor, src_padding: Tensor | None = None) -> Tensor:
        """(N, S) int64 -> (N, S, d_model); `src_padding` as in `forward`."""
        self._check_length("src", src)
        src_padding = self._padding(src, src_padding)
        x = self.src_embedding(src)
        return self.transformer.encoder(x, src_key_padding_mask=src_padding)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        src_padding: Tensor | None = None,
        tgt_padding: Tensor | None = None,
    ) -> Tensor:
        """(N, L) int64 and `memory` (N, S, d_model) -> (N, L, d_model), before the generator.

        Args:
            src_padding, tgt_padding: bool, True = padding; None is no padding.
        """
        self._check_length("tgt", tgt)
        x = self.tgt_embedding(tgt)
        mask = None
        if self.backend == "torch":  # which wants the mask even where it is told that it is causal
            ones = torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool, device=tgt.device)
            mask = ones.triu(1)
        return self.transformer.decoder(
            x,
            memory,
            tgt_mask=mask,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=src_padding,
            tgt_is_causal=True,
        )

    def start(
        self, src: Tensor, max_len: int, beams: int = 1, use_cache: bool | None = None
    ) -> Decoding:
        """Encode `src` (N, S) and get ready to decode N * beams sentences token by token.

        Args:
            max_len: at most so many steps will be taken.
            beams: consecutive sentences that share a row of `src`.
            use_cache: keep keys and values between the steps; None: where that is possible.

        Raises:
            ValueError: `max_len` is larger than the model's, or the cache was asked for and a
                module of the decoder is not the one that the constructor makes, or torch.nn's.
        """
        if not 1 <= max_len <= self.max_len:
            raise ValueError(f"`max_len` must be in [1, {self.max_len}], got {max_len}")
        return decoding.start(self, src, max_len, beams, use_cache)

    def _padding(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        return tokens == self.padding_idx if padding is None else padding

    def _check_length(self, name: str, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] > self.max_len:
            raise ValueError(
                f"`{name}` must be (N, at most max_len = {self.max_len} tokens), "
                f"got shape {tuple(tokens.shape)}"
            )
