"""The way out of everyday mistakes: one line at the end of a message, where there is one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

# Arguments of torch.nn, of torch's functions and of other packages, and what they are called here.
ELSEWHERE = {
    "attn_mask": "`mask=` takes a bool mask (True = visible), `bias=` an additive one; "
    "`fused_attn.scaled_dot_product_attention` has torch's arguments",
    "attention_mask": "`key_padding_mask=` (B, Lk), `mask=` or `bias=`",
    "attn_bias": "`bias=`",
    "is_causal": "`causal=True`",
    "causal_mask": "`causal=True`",
    "dropout": "`dropout_p=`",
    "p": "`dropout_p=`",
    "softmax_scale": "`scale=`",
    "enable_gqa": "grouped heads need no flag here: leave it out",
    "need_weights": '`return_weights="average"` or `"per_head"`',
    "average_attn_weights": '`return_weights="average"`',
    "return_attn_probs": "`return_lse=True` or `return_weights=`",
    "src_key_padding_mask": "`key_padding_mask=` (B, Lk), True = visible, unlike torch.nn's",
    "window_size": "`window=(left, right)`",
    "sliding_window": "`window=(left, right)`",
    "segment_ids": "`document_ids=`",
    "doc_ids": "`document_ids=`",
    "seq_idx": "`document_ids=`",
    "prefix_length": "`prefix_lengths=` (B,)",
    "prefix_lens": "`prefix_lengths=` (B,)",
    "attention_chunk_size": "`chunk=`",
    "chunk_size": "`chunk=`",
    "cu_seqlens": "`cu_seqlens_q=` and `cu_seqlens_k=` of `fused_attn.attention_varlen`",
    "cu_seqlens_q": "`fused_attn.attention_varlen` takes packed batches",
    "cu_seqlens_k": "`fused_attn.attention_varlen` takes packed batches",
    "block_mask": "`mask=`, or `window=`, `causal=`, `key_lengths=` and the others together",
    "score_mod": "`bias=`, `alibi_slopes=` or `softcap=`",
    "approximate": '`activation="gelu_tanh"`',
    "act": "`activation=`",
    "inplace": "`out=x` writes over x",
    "p_dropout": "`dropout_p=`",
    "epsilon": "`eps=`",
    "gamma": "`weight=`",
    "beta": "`bias=`",
}
ACTIVATIONS = {
    "swish": "silu",
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def with_hint(message: str, hint: str | None) -> str:
    """`message`, and a line with the way out of it."""
    return message if hint is None else f"{message}\nhint: {hint}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The word that was meant, if one is near; none in a compiled call, which cannot search."""
    if torch.compiler.is_compiling():
        return None
    close = difflib.get_close_matches(word, list(known), n=1)
    return close[0] if close else None


def refuse_unknown(function: str, unknown: Mapping[str, Any], known: Iterable[str]) -> NoReturn:
    """Raises TypeError for keyword arguments that `function` does not have."""
    name = next(iter(unknown))
    hint = ELSEWHERE.get(name)
    if hint is None:
        close = closest(name, known)
        hint = f"`{close}=`" if close else None
    raise TypeError(with_hint(f"`{function}` got an unexpected argument `{name}`", hint))


def for_no_tensor(name: str, value: object) -> str | None:
    """What to do with an object that is no tensor."""
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if kind == "numpy.ndarray":
        return f"`torch.from_numpy({name})`"
    if kind == "torch.fx.proxy.Proxy":
        return "trace with `fused_attn.fx.symbolic_trace`, which keeps our modules whole"
    if isinstance(value, (list, tuple, int, float)) and not isinstance(value, bool):
        return f"`torch.tensor({name})`"
    return None


def for_dtype(name: str, tensor: Tensor, expected: Iterable[torch.dtype]) -> str | None:
    """What to do with a tensor of another dtype."""
    wanted = tuple(expected)
    if name == "mask" and tensor.is_floating_point():
        return "additive masks are `bias=`"
    if name == "bias" and tensor.dtype == torch.bool:
        return "bool masks are `mask=`, True = visible"
    if name == "key_padding_mask" and not tensor.is_floating_point():
        return "`key_padding_mask.bool()`, True = visible"
    if name == "attn_mask" and not tensor.is_floating_point():
        return "`attn_mask.bool()`, True = visible"
    if tensor.is_complex() or not wanted:
        return None
    return f"`{name}.to({wanted[0]})`"


def for_activation(activation: object) -> str | None:
    """What an activation of another name is called here."""
    name = ""
    if isinstance(activation, str):
        name = activation.lower()
    elif not torch.compiler.is_compiling():  # which does not know the names of functions
        name = getattr(activation, "__name__", type(activation).__name__).lower()
    if name in ("relu", "gelu", "silu"):
        return f"`activation={name!r}`"
    return f"`activation={ACTIVATIONS[name]!r}`" if name in ACTIVATIONS else None
