"""Everyday mistakes with the modules: the error of torch.nn's type, its words, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_attn import (
    FusedFeedForward,
    FusedMultiheadAttention,
    FusedTransformer,
    FusedTransformerDecoder,
    FusedTransformerDecoderLayer,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested", "ignore:The PyTorch API of nested"),
]

N, L, S, E, H = 3, 5, 6, 16, 4


def x(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (N, L, E)))


def attention(**settings: Any) -> FusedMultiheadAttention:
    return FusedMultiheadAttention(E, H, **{"batch_first": True, **settings})


def encoder_layer(**settings: Any) -> FusedTransformerEncoderLayer:
    return FusedTransformerEncoderLayer(E, H, 8, **{"batch_first": True, **settings})


def encoder(**settings: Any) -> FusedTransformerEncoder:
    return FusedTransformerEncoder(encoder_layer(**settings), 1)


def decoder_layer(**settings: Any) -> FusedTransformerDecoderLayer:
    return FusedTransformerDecoderLayer(E, H, 8, **{"batch_first": True, **settings})


def decoder(**settings: Any) -> FusedTransformerDecoder:
    return FusedTransformerDecoder(decoder_layer(**settings), 1)


def transformer(**settings: Any) -> FusedTransformer:
    return FusedTransformer(E, H, 1, 1, 8, **{"batch_first": True, **settings})


def nested() -> Tensor:
    return torch.nested.as_nested_tensor([x(2, E), x(3, E)], layout=torch.jagged)


HIDDEN = torch.zeros(N, L, dtype=torch.bool)
SQUARE = torch.zeros(L, L, dtype=torch.bool)

# What somebody does: the call, the error, its words, and the line with the way out ("" for none).
Mistake = tuple[Callable[[], Any], type[Exception], str, str]
MISTAKES: dict[str, Mistake] = {
    "key_padding_mask to an encoder layer": (
        lambda: encoder_layer()(x(), key_padding_mask=HIDDEN), TypeError,
        "FusedTransformerEncoderLayer.forward() got an unexpected keyword argument "
        "'key_padding_mask'", "hint: `src_key_padding_mask=`, True = padding"),
    "key_padding_mask to an encoder": (
        lambda: encoder()(x(), key_padding_mask=HIDDEN), TypeError, "'key_padding_mask'",
        "hint: `src_key_padding_mask=`, True = padding"),
    "key_padding_mask to a decoder": (
        lambda: decoder()(x(), x(), key_padding_mask=HIDDEN), TypeError, "'key_padding_mask'",
        "hint: `tgt_key_padding_mask=`, True = padding"),
    "src_key_padding_mask to attention": (
        lambda: attention()(x(), x(), x(), src_key_padding_mask=HIDDEN), TypeError,
        "'src_key_padding_mask'", "hint: `key_padding_mask=`, True = padding"),
    "attention_mask of other packages": (
        lambda: encoder()(x(), attention_mask=HIDDEN), TypeError, "'attention_mask'",
        "hint: `src_key_padding_mask=attention_mask == 0`, True = padding"),
    "attn_mask to an encoder layer": (
        lambda: encoder_layer()(x(), attn_mask=SQUARE), TypeError, "'attn_mask'",
        "hint: `src_mask=`"),
    "src_mask to an encoder": (
        lambda: encoder()(x(), src_mask=SQUARE), TypeError, "'src_mask'", "hint: `mask=`"),
    "causal instead of is_causal": (
        lambda: attention()(x(), x(), x(), causal=True), TypeError, "'causal'",
        "hint: `is_causal=`"),
    "is_causal to a decoder layer": (
        lambda: decoder_layer()(x(), x(), is_causal=True), TypeError, "'is_causal'",
        "hint: `tgt_is_causal=`"),
    "weights from a layer": (
        lambda: encoder_layer()(x(), need_weights=True), TypeError, "'need_weights'",
        "hint: layers return no weights; their `self_attn` does where it is called by itself"),
    "misspelt argument": (
        lambda: transformer()(x(), x(), tgt_msk=SQUARE), TypeError, "'tgt_msk'",
        "hint: `tgt_mask=`"),
    "batch_first forgotten, padding": (
        lambda: encoder(batch_first=False)(x(), src_key_padding_mask=HIDDEN), AssertionError,
        f"Expected `key_padding_mask` shape to be ({L}, {N}) but got ({N}, {L})",
        "hint: the module has batch_first=False and reads (L, N, E); with batch_first=True the "
        "sizes fit"),
    "batch_first forgotten, causal mask": (
        lambda: encoder_layer(batch_first=False)(x(), SQUARE), RuntimeError,
        f"The shape of the 2D attn_mask is ({L}, {L}), but should be ({N}, {N}).",
        "hint: the module has batch_first=False and reads (L, N, E); with batch_first=True the "
        "sizes fit"),
    "batch_first forgotten, memory": (
        lambda: decoder_layer(batch_first=False)(x(), x(N, S, E)), RuntimeError,
        f"`key` and `value` must have the batch size of `query`, {L}, got {S}",
        "hint: the module has batch_first=False and reads (L, N, E); with batch_first=True the "
        "sizes fit"),
    "batch_first forgotten, whole model": (
        lambda: transformer(batch_first=False)(x(N, S, E), x()), RuntimeError,
        "the batch number of src and tgt must be equal, got shapes (3, 6, 16) and (3, 5, 16)",
        "hint: the module has batch_first=False and reads (L, N, E); with batch_first=True the "
        "sizes fit"),
    "batch_first too much": (
        lambda: attention()(x(L, N, E), x(S, N, E), x(S, N, E)), RuntimeError,
        f"`key` and `value` must have the batch size of `query`, {L}, got {S}",
        "hint: the module has batch_first=True and reads (N, L, E); with batch_first=False the "
        "sizes fit"),
    "NumPy to attention": (
        lambda: attention()(np.zeros((N, L, E)), x(), x()), TypeError,
        "`query` must be a tensor, got ndarray of shape (3, 5, 16)",
        "hint: `torch.from_numpy(query)`"),
    "NumPy to a layer": (
        lambda: encoder_layer()(np.zeros((N, L, E))), TypeError,
        "`src` must be a tensor, got ndarray of shape (3, 5, 16)",
        "hint: `torch.from_numpy(src)`"),
    "NumPy mask": (
        lambda: encoder()(x(), src_key_padding_mask=np.zeros((N, L))), TypeError,
        "`key_padding_mask` must be a tensor, got ndarray of shape (3, 5)",
        "hint: `torch.from_numpy(key_padding_mask)`"),
    "NumPy memory": (
        lambda: decoder()(x(), np.zeros((N, S, E))), TypeError,
        "`memory` must be a tensor, got ndarray", "hint: `torch.from_numpy(memory)`"),
    "list of numbers": (
        lambda: FusedFeedForward(2, 4)([1.0, 2.0]), TypeError,
        "`x` must be a tensor, got list [1.0, 2.0]", "hint: `torch.tensor(x)`"),
    "no memory": (
        lambda: decoder_layer()(x(), None), TypeError,
        "`memory` must be a tensor, got NoneType", ""),
    "tokens instead of features": (
        lambda: encoder_layer()(torch.zeros(N, L, dtype=torch.int64)), AssertionError,
        f"was expecting embedding dimension of {E}, but got {L}",
        "hint: tokens are embedded first, as by `fused_attn.FusedTransformerEmbedding`"),
    "features in the middle": (
        lambda: attention()(x(N, E, L), x(N, E, L), x(N, E, L)), AssertionError,
        f"was expecting embedding dimension of {E}, but got {L}",
        "hint: features come last: `x.transpose(1, 2)`"),
    "heads split already": (
        lambda: attention()(*[x(N, H, L, 4)] * 3), AssertionError, "received 4-D query tensor",
        "hint: `fused_attn.attention` takes (B, H, L, D)"),
    "keys of other features": (
        lambda: attention()(x(), x(N, S, 6), x(N, S, 6)), RuntimeError,
        f"`key` must have {E} features in its last dimension, got shape (3, 6, 6)",
        "hint: the constructor takes `kdim=6`"),
    "half precision input": (
        lambda: attention()(*[x().half()] * 3), RuntimeError,
        "must have the dtype of the module's weights, torch.float32, got torch.float16",
        "hint: `query.to(torch.float32)`, `module.to(torch.float16)` or torch.autocast"),
    "integer padding mask": (
        lambda: encoder()(x(), src_key_padding_mask=HIDDEN.long()), AssertionError,
        "only bool and floating types of key_padding_mask are supported, got torch.int64",
        "hint: `key_padding_mask.bool()` if 1 = padding, `key_padding_mask == 0` if 1 = token: "
        "True = padding"),
    "integer attention mask": (
        lambda: encoder_layer()(x(), SQUARE.int()), AssertionError,
        "only bool and floating types of attn_mask are supported, got torch.int32",
        "hint: `attn_mask.bool()`, True = hidden"),
    "float64 mask": (
        lambda: attention()(x(), x(), x(), attn_mask=SQUARE.double()), RuntimeError,
        "Expected attn_mask dtype to be torch.bool or torch.float32, but got torch.float64",
        "hint: `attn_mask.to(torch.float32)`"),
    "padding mask as attention mask": (
        lambda: encoder_layer()(x(), HIDDEN), RuntimeError, "The shape of the 2D attn_mask is",
        "hint: a mask of padding is `key_padding_mask=` (`src_key_padding_mask=` of layers), "
        "(N, S)"),
    "attention mask as padding mask": (
        lambda: encoder_layer()(x(), src_key_padding_mask=SQUARE), AssertionError,
        f"Expected `key_padding_mask` shape to be ({N}, {L}) but got ({L}, {L})",
        "hint: a mask of queries and keys is `attn_mask=` (`src_mask=`, `tgt_mask=` of layers)"),
    "padding mask of four dimensions": (
        lambda: encoder()(x(), src_key_padding_mask=HIDDEN[:, None, None]), AssertionError,
        "expected `key_padding_mask` to be `None` or 2-D but found 4-D",
        "hint: `mask[:, 0, 0]`; True = padding"),
    "one padding mask for all": (
        lambda: encoder()(x(), src_key_padding_mask=HIDDEN[0]), AssertionError,
        "expected `key_padding_mask` to be `None` or 2-D but found 1-D",
        f"hint: `mask.expand({N}, -1)`, if it is that of all sequences"),
    "a mask for each sequence": (
        lambda: attention()(x(), x(), x(), attn_mask=SQUARE.expand(N, L, L)), RuntimeError,
        f"The shape of the 3D attn_mask is ({N}, {L}, {L}), but should be ({N * H}, {L}, {L})",
        "hint: `attn_mask[:, None]`, for any shape that broadcasts to (N, H, L, S) is taken"),
    "masks beside nested tensors": (
        lambda: encoder()(nested(), src_key_padding_mask=HIDDEN[:2, :3]), AssertionError,
        "must come without masks",
        "hint: leave the masks out; `is_causal=True` is taken beside them"),
    "nested tensors, batch_first forgotten": (
        lambda: encoder(batch_first=False)(nested()), AssertionError,
        "NestedTensors need batch_first=True", "hint: `batch_first=True` in the constructor"),
    "activation as a function": (
        lambda: FusedFeedForward(E, 8, activation=nn.functional.relu), ValueError,
        "`activation` must be one of 'relu'", "hint: `activation='relu'`"),
    "activation of another name": (
        lambda: FusedFeedForward(E, 8, activation="swish"), ValueError,
        "`activation` must be one of 'relu'", "hint: `activation='silu'`"),
    "torch.jit.script": (
        lambda: torch.jit.script(encoder_layer()), NotImplementedError,
        "torch.jit.script cannot compile FusedTransformerEncoderLayer",
        "hint: use torch.compile or torch.export, or put torch.nn's modules back first with "
        "fused_attn.unfuse(model)"),
    "torch.fx": (
        lambda: torch.fx.symbolic_trace(encoder_layer()), TypeError,
        "`src` must be a tensor, got Proxy",
        "hint: trace with `fused_attn.fx.symbolic_trace`, which keeps our modules whole"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_and_the_way_out_is_said(name: str) -> None:
    call, kind, words, hint = MISTAKES[name]
    with pytest.raises(kind) as caught:
        call()
    assert caught.type is kind
    first, *rest = str(caught.value).splitlines()
    assert words in first
    assert rest == ([hint] if hint else [])


@pytest.mark.parametrize("name", ["batch_first forgotten, padding", "half precision input"])
def test_the_way_out_is_one(name: str) -> None:
    """What the hints say runs."""
    if "padding" in name:
        encoder(batch_first=True)(x(), src_key_padding_mask=HIDDEN)
        return
    attention().to(torch.float16)(*[x().half()] * 3)
    with torch.autocast("cpu", torch.float16):
        attention()(*[x().half()] * 3)


def test_arguments_by_position_and_by_name_still_go_through() -> None:
    out = encoder_layer().eval()(x(), SQUARE, HIDDEN, True)
    named = encoder_layer().eval()
    assert named(src=x(), src_mask=SQUARE, src_key_padding_mask=HIDDEN).shape == out.shape
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'memory'"):
        decoder_layer()(x())
