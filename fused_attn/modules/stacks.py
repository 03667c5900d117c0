"""Stacks of layers and the whole Transformer behind torch.nn's interface."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packing, padding
from .children import Activation, check_nested, fuse_children
from .decoder_layer import FusedTransformerDecoderLayer
from .encoder_layer import FusedTransformerEncoderLayer
from .packing import Sequences
from .padding import PackedCross
from .scripting import NotScriptable


class FusedTransformerEncoder(NotScriptable, nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that packs a padded batch once for all layers.

    A batch padded at its ends runs without work on its padding, as `FusedTransformerEncoderLayer`
    describes, in training as in inference; the last layer's output is 0 there. The constructor's
    `enable_nested_tensor` and `mask_check` steer torch.nn's own way to that and do nothing here.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layers in turn, then the norm; as `torch.nn.TransformerEncoder.forward`.

        Args:
            src: (L, N, E), or (N, L, E) if the layers are batch_first; unbatched (L, E). May be a
                NestedTensor (N, *, E) of either layout if they are batch_first; the output is then
                nested likewise.
            mask, src_key_padding_mask: as of `FusedTransformerEncoderLayer`.
            is_causal: no position sees a later one. None is False: the mask says it all, and is
                not read back to find out whether it is causal.
        """
        if src.is_nested:
            return self._forward_nested(src, mask, src_key_padding_mask, bool(is_causal))
        if src_key_padding_mask is not None and self._is_packable():
            attention = self.layers[0].self_attn
            found = padding.find(src, src_key_padding_mask, mask, bool(is_causal), attention)
            if found is not None:
                tokens = found.padding.gather(src)
                output = self._layers_packed(tokens, found.sequences, found.causal)
                return self._finish(found.padding.scatter(output))
        output = src
        for layer in self.layers:
            ours = isinstance(layer, nn.TransformerEncoderLayer)
            output = layer(
                output,
                src_mask=mask if ours else _as_torch_passes_it(mask, src),
                is_causal=bool(is_causal),
                src_key_padding_mask=(
                    src_key_padding_mask if ours else _as_torch_passes_it(src_key_padding_mask, src)
                ),
            )
        return self._finish(output)

    def _is_packable(self) -> bool:
        return _are_packable(self.layers, FusedTransformerEncoderLayer)

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
        if self._is_packable() and (self.norm is None or packing.is_token_wise([self.norm])):
            tokens, sequences = packing.from_nested(src)
            output = self._layers_packed(tokens, sequences, is_causal)
            return packing.to_nested(self._finish(output), src)
        padded, hidden = packing.pad_nested(src)
        output = self.forward(padded, src_key_padding_mask=hidden, is_causal=is_causal)
        return packing.unpad_nested(output, hidden, src)

    def _finish(self, output: Tensor) -> Tensor:
        return output if self.norm is None else self.norm(output)


class FusedTransformerDecoder(NotScriptable, nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` that packs a padded batch once for all layers.

    Padding of `tgt` and of `memory` costs nothing where `FusedTransformerDecoderLayer` says so.
    Torch's look into the mask is not taken.
    """

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
    ) -> Tensor:
        """The layers in turn, then the norm; as `torch.nn.TransformerDecoder.forward`.

        Args:
            tgt: (L, N, E), or (N, L, E) if the layers are batch_first; unbatched (L, E). May be a
                NestedTensor (N, *, E), and `memory` too, if they are batch_first.
            tgt_is_causal: no target position sees a later one. None is False: the mask says it all,
                and is not read back to find out whether it is causal.
        """
        tgt_causal = bool(tgt_is_causal)
        if memory_mask is None and not tgt.is_nested and self._is_packable():
            found = padding.find_cross(
                tgt,
                memory,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_mask,
                tgt_causal,
                memory_is_causal,
                self.layers[0].self_attn,
                self.layers[0].multihead_attn,
            )
            if found is not None:
                output = self._layers_packed(tgt, memory, found, memory_is_causal)
                return output if self.norm is None else self.norm(output)
        return super().forward(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_causal,
            memory_is_causal=memory_is_causal,
        )

    def _is_packable(self) -> bool:
        return _are_packable(self.layers, FusedTransformerDecoderLayer)

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
        return found.tgt.padding.scatter(tokens)


class FusedTransformer(NotScriptable, nn.Transformer):
    """`torch.nn.Transformer` on fused kernels: same constructor, children, state_dict."""

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


def _are_packable(layers: Any, layer_class: Any) -> bool:
    """True if all of `layers` are such, packable, and of one layout."""
    return len(layers) > 0 and all(
        isinstance(layer, layer_class)
        and layer.is_packable()
        and layer.self_attn.batch_first == layers[0].self_attn.batch_first
        for layer in layers
    )


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
