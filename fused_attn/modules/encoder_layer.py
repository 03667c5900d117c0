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

from ..runtime import checks, debug
from . import masking, packing, padding
from .cache import Cache
from .cached_attention import expect_cacheable
from .children import Activation, check_nested, fuse_children
from .feed_forward import feed_forward
from .mistakes import names_checked
from .packable import CACHE, NO_MASK, PackableLayer, note_nested, note_not_packed, note_packed
from .packing import Sequences
from .padding import PackedSelf
from .residual import add_norm, add_norm_sum
from .scripting import NotScriptable


class FusedTransformerEncoderLayer(NotScriptable, PackableLayer, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fused kernels: same constructor, children, state_dict.

    Any activation callable runs as it is given. Sub-modules are called as modules, so that hooks,
    adapters, quantized and sharded replacements work in inference as in training. Where they are
    plain, residual, dropout and norm run as one operation, and so do linear1's bias, a ReLU, GELU
    or SiLU, and its dropout.

    A batch padded at its ends (`src_key_padding_mask` bool; `src_mask` None or causal) runs packed,
    without work on its padding, in training too. It does not under torch.compile and in captured
    CUDA graphs, whose shapes cannot depend on data, and where something may look across positions:
    a sub-module or activation that has hooks, or is of another class than those known (subclasses
    and parametrized ones too) and does not say `token_wise = True`. Packed or not, the output is 0
    at padding (where a bool mask is True, a floating one -inf), and no gradient comes from there.

    Attributes:
        pack_padding: False to never run packed, and to have torch.nn's numbers at padding.
    """

    _ATTENTIONS = ("self_attn",)
    _TOKEN_WISE = (
        "linear1",
        "activation",
        "dropout",
        "linear2",
        "norm1",
        "norm2",
        "dropout1",
        "dropout2",
    )

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

    @names_checked
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Self-attention and feed-forward, each with its residual, dropout and norm.

        Args:
            src: (L, N, E), or (N, L, E) if batch_first; unbatched (L, E).
            src_mask: as `attn_mask` of `FusedMultiheadAttention`.
            src_key_padding_mask: as its `key_padding_mask`.
            is_causal: as its `is_causal`.
            cache: as its `cache`: `src` follows the positions in it, and the masks are of all keys.

        Returns:
            A new tensor in the shape of `src`.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as torch.nn does for each fault.
        """
        checks.expect_any_tensor("src", src)
        if debug.enabled:
            debug.look_at_padding(self, src_key_padding_mask)
        if cache is not None:
            note_not_packed(self, CACHE)
            return self._cached(src, src_mask, src_key_padding_mask, is_causal, cache)
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or not self.pack_padding:
            note_not_packed(self, NO_MASK)
            return self._dense(src, src_mask, src_key_padding_mask, is_causal)
        if masking.is_left_to_caller(src_key_padding_mask):
            return self._dense(src, src_mask, src_key_padding_mask, is_causal)
        found = self._find(src, src_mask, src_key_padding_mask, is_causal)
        if isinstance(found, PackedSelf):
            note_packed(self, found.padding)
            tokens = found.padding.gather(src)
            tokens = self.forward_packed(tokens, found.sequences, found.causal)
            return found.padding.scatter(tokens)
        note_not_packed(self, found)
        rows = None
        if found != padding.NO_PADDING:
            rows = masking.hidden(src, src_key_padding_mask, self)
        src = masking.clear(src, rows, self.is_known())
        return masking.zero(self._dense(src, src_mask, src_key_padding_mask, is_causal), rows)

    def _find(
        self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor, is_causal: bool
    ) -> PackedSelf | str:
        """How to pack; or why not, "" where it is the layer's own modules."""
        if not self.is_packable():
            return ""
        return padding.find(src, key_padding_mask, mask, is_causal, self.self_attn)

    def _dense(
        self,
        src: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
        **cache: Cache,
    ) -> Tensor:
        """The layer on a batch as it is, padding included."""
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
                **cache,
            )[0],
        )

    def _cached(
        self,
        src: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
        cache: Cache,
    ) -> Tensor:
        """The layer on the positions that follow those in the cache."""
        expect_cacheable("self_attn", self.self_attn)
        rows = None
        if self.pack_padding and not masking.is_left_to_caller(src_key_padding_mask):
            rows = masking.hidden_in_cache(src, src_key_padding_mask, self)
        src = masking.clear(src, rows, self.is_known())
        out = self._dense(src, src_mask, src_key_padding_mask, is_causal, cache=cache)
        return masking.zero(out, rows)

    def _is_own_class(self) -> bool:
        return type(self) is FusedTransformerEncoderLayer

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
        packable = self.is_packable()
        note_nested(self, packable)
        if packable:
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
