"""Keys and values of positions already seen, for decoding one token after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention, in memory allocated once.

    Args:
        batch, num_heads, max_len, head_dim: sizes; max_len positions fit.
        like: a tensor of the device and dtype to allocate.

    Attributes:
        length: positions that are stored.
    """

    def __init__(
        self, batch: int, num_heads: int, max_len: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (batch, num_heads, max_len, head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (N, H, L, D) behind the rest; views of all that is stored.

        Raises:
            ValueError: they do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"the cache holds {self.k.shape[2]} positions, got {end}")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Put what row `rows[i]` of the batch holds at row i; rows (N,) int64."""
        for stored in (self.k, self.v):
            filled = stored[:, :, : self.length]
            filled.copy_(filled.index_select(0, rows))


@dataclass
class LayerCache:
    """What one decoder layer keeps between the tokens.

    Attributes:
        own: of the attention to the tokens so far, (N, H, max_len, D).
        memory_k, memory_v: the projected memory, (M, H, S, D), N a multiple of M: consecutive rows
            of the batch share one.
        memory_padding: (M, S) bool, True = padding, or None.
    """

    own: KeyValueCache
    memory_k: Tensor
    memory_v: Tensor
    memory_padding: Tensor | None = None
