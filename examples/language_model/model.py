"""A decoder-only language model of fused parts, which generates with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fused_attn


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out; positions are rotary, the layers pre-norm.

    Args:
        vocab: number of tokens.
        width, heads, layers, feed_forward, dropout: sizes of the stack.
    """

    def __init__(
        self,
        vocab: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        feed_forward: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        layer = fused_attn.FusedTransformerEncoderLayer(
            width, heads, feed_forward, dropout, batch_first=True, norm_first=True
        )
        layer.self_attn.rotary_base = 10000.0
        self.stack = fused_attn.FusedTransformerEncoder(
            layer, layers, fused_attn.FusedLayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """(N, L) int64 -> logits (N, L, vocab).

        Args:
            key_padding_mask: (N, S) bool, True = padding, of all positions up to the last token.
            cache: of `new_cache`: `tokens` follow those in it.
        """
        x = self.embedding(tokens)
        x = self.stack(x, src_key_padding_mask=key_padding_mask, is_causal=True, cache=cache)
        return self.head(x)

    def new_cache(self, max_len: int) -> Any:
        """An empty cache for max_len positions; what the searches of fused_attn ask for."""
        return self.stack.new_cache(max_len)


def loss_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token (N, L) after those before it."""
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: LanguageModel, text: Tensor, steps: int, batch: int, length: int) -> list[float]:
    """Train on random pieces of `text` (T,) int64; the losses of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length, (batch, 1))
        loss = loss_of(model, text[starts + torch.arange(length)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
