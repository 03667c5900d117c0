"""The encoder layer behind torch.nn's interface.

Attention Is All You Need (Vaswani et al. 2017), figure 1, and its pre-norm form (Xiong et al. 2020,
https://arxiv.org/abs/2002.04745). One path runs in training and in inference; torch.nn's inference
fast path, which calls none of a layer's modules, is never taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packing, padding
from .children import Activation, check_nested, fuse_children
from .feed_forward import feed_forward
from .packing import Sequences
from .residual import add_norm, add_norm_sum, has_hooks
from .scripting import NotScriptable


class FusedTransformerEncoderLayer(NotScriptable, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fused kernels: same constructor, children, state_dict.

    Any activation callable runs as it is given. Sub-modules are called as modules, so that hooks,
    adapters, quantized and sharded replacements work in inference as in training. Where they are
    plain, residual, dropout and norm run as one operation, and so do linear1's bias, a ReLU, GELU
    or SiLU, and its dropout.

    A batch padded at its ends (`src_key_padding_mask` bool; `src_mask` None or causal) runs packed,
    without work on its padding, in training too; the output is 0 there. Under torch.compile and in
    captured CUDA graphs, whose shapes cannot depend on data, and where a sub-module has hooks or is
    another than torch.nn's constructor makes, padding is computed and its output is any number.

    Attributes:
        pack_padding: False to never run packed.
    """

    pack_padding: bool = True

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        fuse_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and feed-forward, each with its residual, dropout and norm.

        Args:
            src: (L, N, E), or (N, L, E) if batch_first; unbatched (L, E).
            src_mask: as `attn_mask` of `FusedMultiheadAttention`.
            src_key_padding_mask: as its `key_padding_mask`.
            is_causal: as its `is_causal`.

        Returns:
            A new tensor in the shape of `src`.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as torch.nn does for each fault.
        """
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is not None and self.is_packable():
            found = padding.find(src, src_key_padding_mask, src_mask, is_causal, self.self_attn)
            if found is not None:
                tokens = found.padding.gather(src)
                tokens = self.forward_packed(tokens, found.sequences, found.causal)
                return found.padding.scatter(tokens)
        return self._blocks(
            src,
            lambda x: self.self_attn(
                x,
                x,
                x,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                attn_mask=src_mask,
                is_causal=is_causal,
            )[0],
        )

    def is_packable(self) -> bool:
        """True if `forward_packed` computes what the sub-modules say, and calls all that hooks."""
        return (
            self.pack_padding
            and type(self) is FusedTransformerEncoderLayer
            and not has_hooks(self)
            and padding.is_plain_attention(self.self_attn)
            and packing.is_token_wise(
                (
                    self.linear1,
                    self.dropout,
                    self.linear2,
                    self.norm1,
                    self.norm2,
                    self.dropout1,
                    self.dropout2,
                )
            )
        )

    def forward_packed(
        self, tokens: Tensor, sequences: Sequences, is_causal: bool = False
    ) -> Tensor:
        """The layer on sequences packed one after the other; (T, E) -> (T, E)."""
        attention: Any = self.self_attn
        return self._blocks(
            tokens, lambda x: attention.attend_packed(x, x, x, sequences, sequences, is_causal)
        )

    def _forward_nested(
        self,
        src: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask)
        check_nested((src,), masks, self.self_attn.batch_first)
        if self.is_packable():
            tokens, sequences = packing.from_nested(src)
            return packing.to_nested(self.forward_packed(tokens, sequences, is_causal), src)
        padded, hidden = packing.pad_nested(src)
        out = self.forward(padded, src_key_padding_mask=hidden, is_causal=is_causal)
        return packing.unpad_nested(out, hidden, src)

    def _blocks(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Both sub-layers on x (..., E), the attention being `attend`."""
        if self.norm_first:
            h, x = add_norm_sum(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            return x + self.dropout2(self._feed_forward(h))
        x = add_norm(attend(x), x, self.dropout1, self.norm1)
        return add_norm(self._feed_forward(x), x, self.dropout2, self.norm2)

    def _feed_forward(self, x: Tensor) -> Tensor:
        activation: Any = self.activation
        return feed_forward(x, self.linear1, activation, self.dropout, self.linear2)
