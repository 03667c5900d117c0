"""Encoder and decoder layers behind torch.nn's interface.

Attention Is All You Need (Vaswani et al. 2017), figure 1, and its pre-norm form (Xiong et al. 2020,
https://arxiv.org/abs/2002.04745). Both layers run one path in training and in inference; torch.nn's
inference fast path, which calls none of the layer's modules, is never taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FusedMultiheadAttention
from .scripting import NotScriptable

Activation = str | Callable[[Tensor], Tensor]


class FusedTransformerEncoderLayer(NotScriptable, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fused kernels: same constructor, children, state_dict.

    Any activation callable runs as it is given. Sub-modules are called as modules, so that hooks,
    adapters, quantized and sharded replacements work in inference as in training.
    """

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
        x = src
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, *masks))
        return self.norm2(x + self._ff_block(x))


class FusedTransformerDecoderLayer(NotScriptable, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fused kernels: same constructor, children, state_dict."""

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


def fuse_children(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    """Turn the modules that torch.nn's constructor made into ours; their parameters stay."""
    for child in layer.children():
        if type(child) is nn.MultiheadAttention:
            child.__class__ = FusedMultiheadAttention
