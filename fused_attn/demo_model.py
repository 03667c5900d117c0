"""The language model of `python -m fused_attn demo`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BYTES = 256
WIDTH, HEADS, LAYERS, FEED_FORWARD = 256, 4, 3, 512
CONTEXT = 512


class LanguageModel(nn.Module):
    """Next-byte prediction with torch.nn's own modules; `fuse` swaps what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FEED_FORWARD, dropout=0.0, batch_first=True, norm_first=True
        )
        final_norm = nn.LayerNorm(WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, final_norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, BYTES)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, 256) for tokens (B, L)."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.encoder(x, mask=self.mask, is_causal=True))
