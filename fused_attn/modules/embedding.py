"""Token embedding, positional encoding and dropout: the Transformer's first layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.embedding.api import embedding
from ..runtime import checks
from .positions import LearnedPositionalEncoding, PositionalEncoding, SinusoidalPositionalEncoding
from .residual import has_hooks, is_plain_tensor
from .scripting import NotScriptable

POSITIONS = ("sinusoidal", "learned", "none")


class TransformerEmbedding(nn.Module):
    """dropout(√d · embedding + positional encoding) of stock torch.nn parts, in several passes.

    The yardstick of `FusedTransformerEmbedding`: the same arguments, parameters and state_dict.

    Args:
        num_tokens: rows of the embedding.
        d_model: features of a token.
        padding_idx: token whose row starts as 0 and gets no gradient from here.
        max_len: number of positions.
        positions: "sinusoidal", "learned" or "none" (as with rotary attention).
        dropout: probability of dropping a feature in training.

    Attributes:
        embedding: `nn.Embedding`; its weight may be shared with an output projection.
        encoding: the positional encoding, or None.

    Raises:
        ValueError: `positions` is none of these, or `dropout` no probability.
    """

    def __init__(
        self,
        num_tokens: int,
        d_model: int,
        padding_idx: int | None = None,
        max_len: int = 512,
        positions: str = "sinusoidal",
        dropout: float = 0.1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if positions not in POSITIONS:
            known = ", ".join(map(repr, POSITIONS))
            raise ValueError(f"`positions` must be one of {known}, got {positions!r}")
        self.scale = math.sqrt(d_model)
        self.embedding = nn.Embedding(num_tokens, d_model, padding_idx, device=device, dtype=dtype)
        self.encoding: PositionalEncoding | None = None
        if positions == "sinusoidal":
            self.encoding = SinusoidalPositionalEncoding(d_model, max_len, device, dtype)
        elif positions == "learned":
            self.encoding = LearnedPositionalEncoding(d_model, max_len, device, dtype)
        self.dropout = nn.Dropout(checks.expect_probability("dropout", dropout))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard deviation d^-½, so that the scaled embedding has 1; the padding's row 0."""
        nn.init.normal_(self.embedding.weight, std=1.0 / self.scale)
        if self.embedding.padding_idx is not None:
            with torch.no_grad():
                self.embedding.weight[self.embedding.padding_idx] = 0.0

    def forward(self, tokens: Tensor, offset: int = 0) -> Tensor:
        """(*, L) int64 -> (*, L, d_model).

        Args:
            offset: position of the first token, as in cached generation.

        Raises:
            IndexError: a token is out of range.
            ValueError: there are more tokens than positions.
        """
        x = self.embedding(tokens) * self.scale
        return self.dropout(x if self.encoding is None else self.encoding(x, offset))


class FusedTransformerEmbedding(NotScriptable, TransformerEmbedding):
    """dropout(√d · embedding + positional encoding) in one pass over memory, backward as well.

    Arguments, parameters and state_dict are those of `TransformerEmbedding`. Children that have
    hooks, or were replaced, are called as the modules that they are.

    Attributes:
        backend: name of the backend that must run the embedding, or None to choose.
    """

    backend: str | None = None

    def forward(self, tokens: Tensor, offset: int = 0) -> Tensor:
        """As `TransformerEmbedding.forward`."""
        if not self._is_plain():
            return super().forward(tokens, offset)
        return embedding(
            tokens,
            self.embedding.weight,
            None if self.encoding is None else self.encoding.table,
            scale=self.scale,
            offset=0 if self.encoding is None else offset,
            padding_idx=self.embedding.padding_idx,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=self.backend,
        )

    def _is_plain(self) -> bool:
        known = (nn.Embedding, nn.Dropout, SinusoidalPositionalEncoding, LearnedPositionalEncoding)
        parts = [part for part in (self.embedding, self.encoding, self.dropout) if part is not None]
        weight: nn.Embedding = self.embedding
        return (
            all(type(part) in known and not has_hooks(part) for part in parts)
            and weight.max_norm is None
            and not weight.scale_grad_by_freq
            and not weight.sparse
            and is_plain_tensor(weight.weight)
            and (self.encoding is None or is_plain_tensor(self.encoding.table))
        )
