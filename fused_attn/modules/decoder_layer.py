"""The decoder layer behind torch.nn's interface.

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
from .cache import LayerCache
from .cached_attention import expect_cacheable
from .children import Activation, check_nested, fuse_children
from .feed_forward import feed_forward
from .mistakes import names_checked
from .packable import CACHE, NO_MASK, PackableLayer, note_nested, note_not_packed, note_packed
from .packing import Sequences
from .padding import Masks, PackedCross
from .residual import add_norm, add_norm_sum
from .scripting import NotScriptable


class FusedTransformerDecoderLayer(NotScriptable, PackableLayer, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fused kernels.

    Same constructor, children and state_dict. Sub-modules are called, and joined to one operation
    where they are plain, as in `FusedTransformerEncoderLayer`.

    A batch runs packed as `FusedTransformerEncoderLayer` says if its `tgt` is padded at the ends
    (`tgt_key_padding_mask` bool; `tgt_mask` None or causal), its `memory` anywhere
    (`memory_key_padding_mask` bool, no `memory_mask`), or both. Packed or not, the output is 0 at
    the padding of `tgt`.

    Attributes:
        pack_padding: False to never run packed, and to have torch.nn's numbers at padding.
    """

    _ATTENTIONS = ("self_attn", "multihead_attn")
    _TOKEN_WISE = (
        "linear1",
        "activation",
        "dropout",
        "linear2",
        "norm1",
        "norm2",
        "norm3",
        "dropout1",
        "dropout2",
        "dropout3",
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch.nn's puts relu in front of an activation that is a module, in every copy.
        nn.Module.__setstate__(self, state)
        if not hasattr(self, "activation"):
            self.activation = F.relu

    @names_checked
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Self-attention, attention over `memory`, feed-forward, each with residual and norm.

        Args:
            tgt: (L, N, E), or (N, L, E) if batch_first; unbatched (L, E).
            memory: (S, N, E), (N, S, E) or (S, E).
            tgt_mask, memory_mask: as `attn_mask` of `FusedMultiheadAttention`.
            tgt_key_padding_mask, memory_key_padding_mask: as its `key_padding_mask`.
            tgt_is_causal, memory_is_causal: as its `is_causal`.
            cache: `tgt` follows the positions in `cache.own`, and its masks are of all of them; the
                memory is projected once, and must be the same one in later calls.

        Returns:
            A new tensor in the shape of `tgt`.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as torch.nn does for each fault.
        """
        checks.expect_any_tensor("tgt", tgt)
        checks.expect_any_tensor("memory", memory)
        if debug.enabled:
            debug.look_at_padding(self, tgt_key_padding_mask)
            debug.look_at_padding(self, memory_key_padding_mask)
        masks = Masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if cache is not None:
            note_not_packed(self, CACHE)
            return self._cached(tgt, memory, masks, tgt_is_causal, memory_is_causal, cache)
        if tgt.is_nested or memory.is_nested:
            return self._forward_nested(tgt, memory, masks, tgt_is_causal, memory_is_causal)
        paddings = (tgt_key_padding_mask, memory_key_padding_mask)
        if any(masking.is_left_to_caller(mask) for mask in paddings):
            return self._dense(tgt, memory, masks, tgt_is_causal, memory_is_causal)
        if paddings == (None, None) or not self.pack_padding:
            note_not_packed(self, NO_MASK)
            return self._dense(tgt, memory, masks, tgt_is_causal, memory_is_causal)
        found = self._find(tgt, memory, masks, tgt_is_causal, memory_is_causal)
        if isinstance(found, PackedCross):
            note_packed(self, found.tgt.padding, found.memory)
            tokens = self.forward_packed(
                found.tgt.padding.gather(tgt),
                found.tgt.sequences,
                found.memory.gather(memory),
                found.memory_sequences,
                found.tgt.causal,
                memory_is_causal,
            )
            return found.tgt.padding.scatter(tokens)
        note_not_packed(self, found)
        if found == padding.NO_PADDING:
            return self._dense(tgt, memory, masks, tgt_is_causal, memory_is_causal)
        known = self.is_known()
        rows = masking.hidden(tgt, tgt_key_padding_mask, self)
        tgt = masking.clear(tgt, rows, known)
        memory = masking.clear(memory, masking.hidden(memory, memory_key_padding_mask, self), known)
        return masking.zero(self._dense(tgt, memory, masks, tgt_is_causal, memory_is_causal), rows)

    def _find(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: Masks,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> PackedCross | str:
        """How to pack; or why not, "" where it is the layer's own modules."""
        if not self.is_packable():
            return ""
        return padding.find_cross(
            tgt, memory, masks, tgt_is_causal, memory_is_causal, self.self_attn, self.multihead_attn
        )

    def _dense(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: Masks,
        tgt_is_causal: bool,
        memory_is_causal: bool,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The layer on a batch as it is, padding included."""
        own: Any = {} if cache is None else {"cache": cache.own}
        cross: Any = {} if cache is None else {"cache": cache.memory}
        return self._blocks(
            tgt,
            lambda x: self.self_attn(
                x,
                x,
                x,
                key_padding_mask=masks.tgt_padding,
                need_weights=False,
                attn_mask=masks.tgt,
                is_causal=tgt_is_causal,
                **own,
            )[0],
            lambda x: self.multihead_attn(
                x,
                memory,
                memory,
                key_padding_mask=masks.memory_padding,
                need_weights=False,
                attn_mask=masks.memory,
                is_causal=memory_is_causal,
                **cross,
            )[0],
        )

    def _cached(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: Masks,
        tgt_is_causal: bool,
        memory_is_causal: bool,
        cache: LayerCache,
    ) -> Tensor:
        """The layer on the positions that follow those in the cache."""
        if not isinstance(cache, LayerCache):
            raise TypeError(f"`cache` must be a LayerCache, got {checks.type_name(cache)}")
        for name in self._ATTENTIONS:
            expect_cacheable(name, getattr(self, name))
        if memory_is_causal:
            raise ValueError("`memory_is_causal` must be False with a `cache`")
        rows = None
        if self.pack_padding and not masking.is_left_to_caller(masks.tgt_padding):
            rows = masking.hidden_in_cache(tgt, masks.tgt_padding, self)
        known = self.is_known()
        tgt = masking.clear(tgt, rows, known)
        if self.pack_padding:
            hidden = masking.hidden(memory, masks.memory_padding, self)
            memory = masking.clear(memory, hidden, known)
        return masking.zero(self._dense(tgt, memory, masks, tgt_is_causal, False, cache), rows)

    def _is_own_class(self) -> bool:
        return type(self) is FusedTransformerDecoderLayer

    def forward_packed(
        self,
        tokens: Tensor,
        sequences: Sequences,
        memory: Tensor,
        memory_sequences: Sequences,
        is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer on sequences packed one after the other; (T, E) and (Tk, E) -> (T, E)."""
        own: Any = self.self_attn
        cross: Any = self.multihead_attn
        return self._blocks(
            tokens,
            lambda x: own.attend_packed(x, x, x, sequences, sequences, is_causal),
            lambda x: cross.attend_packed(
                x, memory, memory, sequences, memory_sequences, memory_is_causal
            ),
        )

    def is_cacheable(self) -> bool:
        """True if `forward_cached` computes what the sub-modules say, and calls all that hooks."""
        own: Any = self.self_attn
        cross: Any = self.multihead_attn
        return (
            self._is_plain()
            and own.batch_first
            and cross._qkv_same_embed_dim
            and not any(a.add_zero_attn or a.bias_k is not None for a in (own, cross))
            and getattr(cross, "rotary_base", None) is None
        )

    def forward_cached(self, x: Tensor, cache: LayerCache, memory_padding: Tensor | None) -> Tensor:
        """The layer on the tokens x (N, L, E) that follow those in `cache`, which takes them in.

        Args:
            cache: with a memory of M rows that is projected already, N a multiple of M: consecutive
                rows of x share one.
            memory_padding: (M, S) bool, True = padding, or None.
        """
        own: Any = self.self_attn
        cross: Any = self.multihead_attn
        k, v = cache.memory.k, cache.memory.v
        assert k is not None

        def attend_memory(h: Tensor) -> Tensor:
            # Rows of one memory are so many queries of it, which saves copies of it.
            queries = h.reshape(k.shape[0], -1, h.shape[-1])
            return cross.attend_projected(queries, k, v, memory_padding).reshape(h.shape)

        return self._blocks(x, lambda h: own.attend_cached(h, cache.own), attend_memory)

    def _forward_nested(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: Masks,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        if not (tgt.is_nested and memory.is_nested):
            raise AssertionError("`tgt` and `memory` must both be NestedTensors, or neither")
        check_nested((tgt, memory), masks, self.self_attn.batch_first)
        packable = self.is_packable()
        note_nested(self, packable)
        causal = (tgt_is_causal, memory_is_causal)
        if packable:
            tokens, sequences = packing.from_nested(tgt)
            out = self.forward_packed(tokens, sequences, *packing.from_nested(memory), *causal)
            return packing.to_nested(out, tgt)
        padded, hidden = packing.pad_nested(tgt)
        padded_memory, hidden_memory = packing.pad_nested(memory)
        none = (None, None)
        out = self.forward(padded, padded_memory, *none, hidden, hidden_memory, *causal)
        return packing.unpad_nested(out, hidden, tgt)

    def _blocks(
        self,
        x: Tensor,
        attend: Callable[[Tensor], Tensor],
        attend_memory: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The three sub-layers on x (..., E)."""
        if self.norm_first:
            h, x = add_norm_sum(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            h, x = add_norm_sum(attend_memory(h), x, self.dropout2, self.norm3)
            return x + self.dropout3(self._feed_forward(h))
        x = add_norm(attend(x), x, self.dropout1, self.norm1)
        x = add_norm(attend_memory(x), x, self.dropout2, self.norm2)
        return add_norm(self._feed_forward(x), x, self.dropout3, self.norm3)

    def _feed_forward(self, x: Tensor) -> Tensor:
        activation: Any = self.activation
        return feed_forward(x, self.linear1, activation, self.dropout, self.linear2)
