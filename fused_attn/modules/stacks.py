"""Stacks of layers and the whole Transformer behind torch.nn's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime import checks, debug
from ..runtime.hints import with_hint
from . import masking, packing, padding
from .cache import Cache, KeyValueCache, LayerCache
from .cached_attention import check_caches, options_of, own_cache
from .children import Activation, check_nested, fuse_children
from .decoder_layer import FusedTransformerDecoderLayer
from .encoder_layer import FusedTransformerEncoderLayer
from .mistakes import names_checked, other_order
from .packable import NO_MASK, note_nested, note_not_packed, note_packed
from .packable_stack import PackableStack, PackPadding
from .packing import Sequences
from .padding import Masks, PackedCross, PackedSelf
from .paged_cache import PagedKeyValueCache
from .scripting import NotScriptable


class FusedTransformerEncoder(NotScriptable, PackableStack, nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that packs a padded batch once for all layers.

    A batch padded at its ends runs without work on its padding where all layers and the norm can,
    as `FusedTransformerEncoderLayer` describes, in training as in inference. Packed or not, the
    output is 0 at padding, after the norm too. Where nothing is packed, layers hand on at padding
    what torch.nn's do. The constructor's `enable_nested_tensor` and `mask_check` steer torch.nn's
    own way to that and do nothing here.

    Attributes:
        pack_padding: that of the layers: True if all have it. Setting it sets theirs.
    """

    _LAYER_CLASS = FusedTransformerEncoderLayer

    @names_checked
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        cache: Sequence[Cache] | None = None,
    ) -> Tensor:
        """The layers in turn, then the norm; as `torch.nn.TransformerEncoder.forward`.

        Args:
            src: (L, N, E), or (N, L, E) if the layers are batch_first; unbatched (L, E). May be a
                NestedTensor (N, *, E) of either layout if they are batch_first; the output is then
                nested likewise.
            mask, src_key_padding_mask: as of `FusedTransformerEncoderLayer`.
            is_causal: no position sees a later one. None is False: the mask says it all, and is
                not read back to find out whether it is causal.
            cache: one for each layer, as the layers take it; `new_cache` makes them.
        """
        checks.expect_any_tensor("src", src)
        if debug.enabled:
            debug.look_at_padding(self, src_key_padding_mask)
        if cache is not None:
            check_caches(cache, self.layers)
            return self._dense(src, mask, src_key_padding_mask, bool(is_causal), cache)
        if src.is_nested:
            return self._forward_nested(src, mask, src_key_padding_mask, bool(is_causal))
        if src_key_padding_mask is None or not self.pack_padding:
            note_not_packed(self, NO_MASK)
            return self._dense(src, mask, src_key_padding_mask, bool(is_causal))
        found = self._find(src, mask, src_key_padding_mask, bool(is_causal))
        if isinstance(found, PackedSelf):
            note_packed(self, found.padding)
            tokens = found.padding.gather(src)
            output = self._layers_packed(tokens, found.sequences, found.causal)
            return found.padding.scatter(self._finish(output))
        note_not_packed(self, found)
        rows = None
        if found != padding.NO_PADDING:
            rows = masking.hidden(src, src_key_padding_mask, self.layout_owner())
        src = masking.clear(src, rows, self.is_known())
        marked = masking.leave_to_caller(src_key_padding_mask)
        return masking.zero(self._dense(src, mask, marked, bool(is_causal)), rows)

    def new_cache(
        self, max_len: int | None = None, page_size: int | None = None
    ) -> list[KeyValueCache | PagedKeyValueCache]:
        """An empty cache for each layer, with room for max_len positions, in pages or in one."""
        return [own_cache(max_len, page_size) for _ in self.layers]

    def _find(
        self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor, is_causal: bool
    ) -> PackedSelf | str:
        """How to pack; or why not, "" where it is the modules."""
        if not self.is_packable():
            return ""
        return padding.find(src, key_padding_mask, mask, is_causal, self.layers[0].self_attn)

    def _dense(
        self,
        src: Tensor,
        mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Layers and norm on a batch as it is, padding included."""
        output = src
        for layer, options in zip(self.layers, options_of(caches, self.layers), strict=True):
            ours = isinstance(layer, nn.TransformerEncoderLayer)
            output = layer(
                output,
                src_mask=mask if ours else _as_torch_passes_it(mask, src),
                is_causal=is_causal,
                src_key_padding_mask=(
                    src_key_padding_mask if ours else _as_torch_passes_it(src_key_padding_mask, src)
                ),
                **options,
            )
        return self._finish(output)

    def _layers_packed(self, tokens: Tensor, sequences: Sequences, is_causal: bool) -> Tensor:
        for layer in self.layers:
            tokens = layer.forward_packed(tokens, sequences, is_causal)
        return tokens

    def _forward_nested(
        self,
        src: Tensor,
        mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first if len(self.layers) else True
        check_nested((src,), (mask, src_key_padding_mask), batch_first)
        packable = self.is_packable()
        note_nested(self, packable)
        if packable:
            tokens, sequences = packing.from_nested(src)
            output = self._layers_packed(tokens, sequences, is_causal)
            return packing.to_nested(self._finish(output), src)
        padded, hidden = packing.pad_nested(src)
        output = self.forward(padded, src_key_padding_mask=hidden, is_causal=is_causal)
        return packing.unpad_nested(output, hidden, src)


class FusedTransformerDecoder(NotScriptable, PackableStack, nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` that packs a padded batch once for all layers.

    Padding of `tgt` and of `memory` costs nothing where `FusedTransformerDecoderLayer` says so. The
    output is 0 at the padding of `tgt` as that of `FusedTransformerEncoder` is. Torch's look into
    the mask is not taken.

    Attributes:
        pack_padding: that of the layers: True if all have it. Setting it sets theirs.
    """

    _LAYER_CLASS = FusedTransformerDecoderLayer

    @names_checked
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """The layers in turn, then the norm; as `torch.nn.TransformerDecoder.forward`.

        Args:
            tgt: (L, N, E), or (N, L, E) if the layers are batch_first; unbatched (L, E). May be a
                NestedTensor (N, *, E), and `memory` too, if they are batch_first.
            tgt_is_causal: no target position sees a later one. None is False: the mask says it all,
                and is not read back to find out whether it is causal.
            cache: one for each layer, as the layers take it; `new_cache` makes them.
        """
        checks.expect_any_tensor("tgt", tgt)
        checks.expect_any_tensor("memory", memory)
        if debug.enabled:
            debug.look_at_padding(self, tgt_key_padding_mask)
            debug.look_at_padding(self, memory_key_padding_mask)
        causal = (bool(tgt_is_causal), memory_is_causal)
        masks = Masks(tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if cache is not None:
            check_caches(cache, self.layers)
            return self._dense(tgt, memory, masks, causal, cache)
        if (masks[2:] == (None, None)) or tgt.is_nested or not self.pack_padding:
            note_not_packed(self, NO_MASK)
            return self._dense(tgt, memory, masks, causal)
        found = self._find(tgt, memory, masks, causal)
        if isinstance(found, PackedCross):
            note_packed(self, found.tgt.padding, found.memory)
            output = self._finish(self._layers_packed(tgt, memory, found, memory_is_causal))
            return found.tgt.padding.scatter(output)
        note_not_packed(self, found)
        marked = [masking.leave_to_caller(mask) for mask in masks[2:]]
        masks = Masks(tgt_mask, memory_mask, *marked)
        if found == padding.NO_PADDING:
            return self._dense(tgt, memory, masks, causal)
        known = self.is_known()
        owner = self.layout_owner()
        rows = masking.hidden(tgt, tgt_key_padding_mask, owner)
        tgt = masking.clear(tgt, rows, known)
        memory = masking.clear(
            memory, masking.hidden(memory, memory_key_padding_mask, owner), known
        )
        return masking.zero(self._dense(tgt, memory, masks, causal), rows)

    def new_cache(
        self, max_len: int | None = None, page_size: int | None = None
    ) -> list[LayerCache]:
        """An empty cache for each layer, with room for max_len positions, in pages or in one."""
        return [LayerCache(own_cache(max_len, page_size)) for _ in self.layers]

    def _find(
        self, tgt: Tensor, memory: Tensor, masks: Masks, causal: tuple[bool, bool]
    ) -> PackedCross | str:
        """How to pack; or why not, "" where it is the modules."""
        if not self.is_packable():
            return ""
        first = self.layers[0]
        return padding.find_cross(
            tgt, memory, masks, *causal, first.self_attn, first.multihead_attn
        )

    def _dense(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: Masks,
        causal: tuple[bool, bool],
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Layers and norm on a batch as it is, padding included."""
        output = tgt
        for layer, options in zip(self.layers, options_of(caches, self.layers), strict=True):
            output = layer(
                output,
                memory,
                tgt_mask=masks.tgt,
                memory_mask=masks.memory,
                tgt_key_padding_mask=masks.tgt_padding,
                memory_key_padding_mask=masks.memory_padding,
                tgt_is_causal=causal[0],
                memory_is_causal=causal[1],
                **options,
            )
        return self._finish(output)

    def _layers_packed(
        self, tgt: Tensor, memory: Tensor, found: PackedCross, memory_is_causal: bool
    ) -> Tensor:
        tokens = found.tgt.padding.gather(tgt)
        memory_tokens = found.memory.gather(memory)
        for layer in self.layers:
            tokens = layer.forward_packed(
                tokens,
                found.tgt.sequences,
                memory_tokens,
                found.memory_sequences,
                found.tgt.causal,
                memory_is_causal,
            )
        return tokens


class FusedTransformer(NotScriptable, PackPadding, nn.Transformer):
    """`torch.nn.Transformer` on fused kernels: same constructor, children, state_dict.

    Attributes:
        pack_padding: that of the layers: True if all have it. Setting it sets theirs.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
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
            num_encoder_layers,
            num_decoder_layers,
            dim_feedforward,
            dropout,
            activation,
            custom_encoder,
            custom_decoder,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        if custom_encoder is None:
            _fuse_stack(self.encoder, FusedTransformerEncoder, FusedTransformerEncoderLayer)
        if custom_decoder is None:
            _fuse_stack(self.decoder, FusedTransformerDecoder, FusedTransformerDecoderLayer)

    @names_checked
    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output; as `torch.nn.Transformer.forward`.

        Raises:
            RuntimeError: `src` and `tgt` do not fit each other, or the model.
        """
        checks.expect_any_tensor("src", src)
        checks.expect_any_tensor("tgt", tgt)
        if debug.enabled:
            debug.look_at_memory(src_key_padding_mask, memory_key_padding_mask)
        if src.dim() == tgt.dim() == 3 and not (src.is_nested or tgt.is_nested):
            _check_batches(src, tgt, self.batch_first)
        return super().forward(
            src,
            tgt,
            src_mask,
            tgt_mask,
            memory_mask,
            src_key_padding_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            src_is_causal,
            tgt_is_causal,
            memory_is_causal,
        )


def _check_batches(src: Tensor, tgt: Tensor, batch_first: bool) -> None:
    batch = 0 if batch_first else 1
    if src.shape[batch] != tgt.shape[batch]:
        message = (
            "the batch number of src and tgt must be equal, "
            f"got shapes {tuple(src.shape)} and {tuple(tgt.shape)}"
        )
        fits = src.shape[1 - batch] == tgt.shape[1 - batch]
        raise RuntimeError(with_hint(message, other_order(batch_first) if fits else None))


def _fuse_stack(stack: Any, stack_class: Any, layer_class: Any) -> None:
    stack.__class__ = stack_class
    fuse_children(stack)
    for layer in stack.layers:
        layer.__class__ = layer_class
        fuse_children(layer)


def _as_torch_passes_it(mask: Tensor | None, src: Tensor) -> Tensor | None:
    """Floating masks: what torch.nn.TransformerEncoder hands to layers of other people."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=src.dtype).masked_fill_(mask, -torch.inf)
