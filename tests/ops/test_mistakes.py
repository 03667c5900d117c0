"""Everyday mistakes with the functions: each is named, and where there is a way out, it is said."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch

import fused_attn
from fused_attn import UnsupportedError
from fused_attn.runtime import native

B, H, L, D = 2, 4, 6, 8


def attend(**changes: Any) -> Any:
    tensors = {name: torch.randn(B, H, L, D) for name in ("q", "k", "v")} | changes
    return fused_attn.attention(**tensors)


def pack(**changes: Any) -> Any:
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    tensors: dict[str, Any] = {name: torch.randn(L, H, D) for name in ("q", "k", "v")}
    tensors |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return fused_attn.attention_varlen(
        **{**tensors, "max_seqlen_q": 4, "max_seqlen_k": 4} | changes
    )


def norm(**changes: Any) -> Any:
    return fused_attn.layer_norm(**{"x": torch.randn(3, D), "normalized_shape": (D,)} | changes)


def activate(**changes: Any) -> Any:
    return fused_attn.bias_activation(**{"x": torch.randn(3, D), "activation": "gelu"} | changes)


def embed(**changes: Any) -> Any:
    tensors = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.randn(5, D)}
    return fused_attn.embedding(**tensors | changes)


def trace() -> Any:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fused_attn.attention(x, x, x)

    return torch.fx.symbolic_trace(Model())


X = torch.randn(B, H, L, D)
ONES = torch.ones(L, L)
LONG = torch.zeros(2, 3, dtype=torch.int64)

# What somebody does: the call, the error, its words, and the line with the way out ("" for none).
MISTAKES: dict[str, tuple[Any, type[Exception], str, str]] = {
    "additive mask as mask": (
        functools.partial(attend, mask=ONES), TypeError,
        "`mask` must be torch.bool, got torch.float32", "hint: additive masks are `bias=`"),
    "bool mask as bias": (
        functools.partial(attend, bias=ONES.bool()), TypeError,
        "`bias` must be torch.float32, got torch.bool", "hint: bool masks are `mask=`, True = visible"),
    "integer mask": (
        functools.partial(attend, mask=ONES.int()), TypeError, "`mask` must be torch.bool",
        "hint: `mask.to(torch.bool)`"),
    "integer padding mask": (
        functools.partial(attend, key_padding_mask=torch.ones(B, L).long()), TypeError,
        "`key_padding_mask` must be torch.bool", "hint: `key_padding_mask.bool()`, True = visible"),
    "torch's attn_mask": (
        functools.partial(attend, attn_mask=ONES), TypeError,
        "`attention` got an unexpected argument `attn_mask`", "hint: `mask=` takes a bool mask"),
    "torch's is_causal": (
        functools.partial(attend, is_causal=True), TypeError, "unexpected argument `is_causal`",
        "hint: `causal=True`"),
    "dropout": (
        functools.partial(attend, dropout=0.1), TypeError, "unexpected argument `dropout`",
        "hint: `dropout_p=`"),
    "softmax_scale": (
        functools.partial(attend, softmax_scale=0.1), TypeError, "unexpected argument", "`scale=`"),
    "need_weights": (
        functools.partial(attend, need_weights=True), TypeError, "unexpected argument",
        'hint: `return_weights="average"`'),
    "enable_gqa": (
        functools.partial(attend, enable_gqa=True), TypeError, "unexpected argument",
        "hint: grouped heads need no flag"),
    "window_size": (
        functools.partial(attend, window_size=(3, 0)), TypeError, "unexpected argument",
        "hint: `window=(left, right)`"),
    "cu_seqlens to attention": (
        functools.partial(attend, cu_seqlens_q=LONG), TypeError, "unexpected argument",
        "hint: `fused_attn.attention_varlen` takes packed batches"),
    "a slip of the finger": (
        functools.partial(attend, sclae=0.1), TypeError, "unexpected argument `sclae`",
        "hint: `scale=`"),
    "nonsense": (
        functools.partial(attend, quux=0.1), TypeError, "unexpected argument `quux`", ""),
    "NumPy array": (
        functools.partial(attend, q=np.zeros((B, H, L, D))), TypeError,
        r"`q` must be a tensor, got ndarray of shape \(2, 4, 6, 8\)", "hint: `torch.from_numpy(q)`"),
    "list": (
        functools.partial(attend, q=[[1.0] * 100] * 100), TypeError,
        r"`q` must be a tensor, got list .{0,80}\.\.\.\n", "hint: `torch.tensor(q)`"),
    "traced by torch.fx": (
        trace, TypeError, "`q` must be a tensor, got Proxy", "hint: trace with `fused_attn.fx"),
    "half and float": (
        functools.partial(attend, k=X.half()), TypeError, "`k` must be torch.float32, got torch.float16",
        "hint: `k.to(torch.float32)`"),
    "integers": (
        functools.partial(attend, q=X.long()), TypeError, "`q` must be torch.float32 or",
        "hint: `q.to(torch.float32)`"),
    "another device": (
        functools.partial(attend, v=X.to("meta")), ValueError, "`v` must be on cpu, got meta",
        "hint: `v.to('cpu')`"),
    "unbatched": (
        functools.partial(attend, q=X[0]), ValueError, "`q` must have 4 dimensions", ""),
    "heads last": (
        functools.partial(attend, k=torch.randn(B, 3, L, D), v=torch.randn(B, 3, L, D)), ValueError,
        "number of heads that divides", "hint: tensors (B, L, heads, head size) want `layout='blhd'`"),
    "layout": (
        functools.partial(attend, layout="BSHD"), ValueError,
        "`layout` must be 'bhld' or 'blhd', got 'BSHD'", ""),
    "mask as causal": (
        functools.partial(attend, causal=ONES.bool()), ValueError, "`causal` must be False, True",
        "hint: masks are `mask=`"),
    "one number as window": (
        functools.partial(attend, window=128), ValueError, r"`window` must be \(left, right\)",
        "hint: `window=(128, 0)` looks back only"),
    "percent of dropout": (
        functools.partial(attend, dropout_p=10), ValueError, r"`dropout_p` must be in \[0, 1\], got 10",
        ""),
    "scale as a tensor": (
        functools.partial(attend, scale=torch.tensor(0.5)), TypeError,
        "`scale` must be a number, got a torch.float32 tensor", "hint: `float(scale)`"),
    "weights as a flag": (
        functools.partial(attend, return_weights=True), ValueError,
        "`return_weights` must be None, 'average' or 'per_head', got bool True", ""),
    "out with a gradient": (
        functools.partial(attend, q=X.clone().requires_grad_(), out=X), ValueError,
        "`out` must be None where a gradient is wanted", "hint: `with torch.no_grad():`"),
    "misspelled backend": (
        functools.partial(attend, backend="tritn"), ValueError, "`backend` must be one of 'cuda', 'tri",
        "hint: `backend='triton'`"),
    "a backend that cannot": (
        functools.partial(attend, q=X.to("meta"), k=X.to("meta"), v=X.to("meta"), backend="cpu"),
        UnsupportedError, "backend 'cpu' cannot run attention on meta",
        "hint: leave `backend` out, and the first that can runs the call"),
    "lengths as int32": (
        functools.partial(attend, key_lengths=torch.tensor([3, 4], dtype=torch.int32)), TypeError,
        "`key_lengths` must be torch.int64", "hint: `key_lengths.to(torch.int64)`"),
    "lengths as a list": (
        functools.partial(attend, key_lengths=[3, 4]), TypeError, "`key_lengths` must be a tensor",
        "hint: `torch.tensor(key_lengths)`"),
    "slopes in half": (
        functools.partial(attend, alibi_slopes=torch.ones(H).half()), TypeError,
        "`alibi_slopes` must be torch.float32", "hint: `alibi_slopes.to(torch.float32)`"),
    "offsets as int64": (
        functools.partial(pack, cu_seqlens_q=torch.tensor([0, 2, 6])), TypeError,
        "`cu_seqlens_q` must be torch.int32", "hint: `cu_seqlens_q.to(torch.int32)`"),
    "longest as a tensor": (
        functools.partial(pack, max_seqlen_q=torch.tensor(4)), ValueError,
        "`max_seqlen_q` must be an int", "hint: `int(max_seqlen_q)`"),
    "padded batch to varlen": (
        functools.partial(pack, q=X), ValueError, "`q` must have 3 dimensions", ""),
    "mask to varlen": (
        functools.partial(pack, is_causal=True), TypeError, "`attention_varlen` got an unexpected",
        "hint: `causal=True`"),
    "torch's name of an activation": (
        functools.partial(activate, activation=torch.nn.functional.gelu), ValueError,
        "`activation` must be one of", "hint: `activation='gelu'`"),
    "swish": (
        functools.partial(activate, activation="swish"), ValueError, "`activation` must be one of",
        "hint: `activation='silu'`"),
    "approximate": (
        functools.partial(activate, approximate="tanh"), TypeError, "unexpected argument",
        'hint: `activation="gelu_tanh"`'),
    "odd gates": (
        functools.partial(activate, x=torch.randn(3, 7), gated=True), ValueError,
        "`x` must have an even last dimension", ""),
    "another width": (
        functools.partial(norm, normalized_shape=(D + 1,)), ValueError,
        r"`x` must end in `normalized_shape` \(9,\), got shape \(3, 8\)", ""),
    "no width": (
        functools.partial(norm, normalized_shape=None), ValueError, "`normalized_shape` must be", ""),
    "gamma": (
        functools.partial(norm, gamma=torch.ones(D)), TypeError, "unexpected argument `gamma`",
        "hint: `weight=`"),
    "epsilon": (
        functools.partial(norm, epsilon=1e-5), TypeError, "unexpected argument", "hint: `eps=`"),
    "weight of another dtype": (
        functools.partial(norm, weight=torch.ones(D).double()), TypeError, "`weight` must be",
        "hint: `weight.to(torch.float32)`"),
    "tokens as floats": (
        functools.partial(embed, tokens=LONG.float()), TypeError, "`tokens` must be torch.int64",
        "hint: `tokens.to(torch.int64)`"),
    "tokens and weight swapped": (
        functools.partial(embed, tokens=torch.randn(5, D), weight=LONG), TypeError,
        "`weight` must be torch.float32", "hint: `weight.to(torch.float32)`"),
    "a token outside": (
        functools.partial(embed, tokens=LONG + 9), IndexError, "`tokens` must be in", ""),
    "positions without a table": (
        functools.partial(embed, positions=LONG), ValueError, "`positions` must be None", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_names_the_mistake_and_the_way_out(name: str) -> None:
    call, kind, words, hint = MISTAKES[name]
    if name == "a backend that cannot" and native.why_not() is not None:
        pytest.skip("no compiled part")
    with pytest.raises(kind, match=words) as caught:
        call()
    lines = str(caught.value).splitlines()
    if hint:
        assert hint in lines[-1]
        assert lines[-1].startswith("hint: ")
    else:
        assert "hint: " not in str(caught.value)


def test_a_message_does_not_print_data() -> None:
    with pytest.raises(TypeError) as caught:
        attend(q=np.zeros((100, 100)))
    assert len(str(caught.value)) < 200


# Not those whose call the compiler itself cannot follow.
COMPILED = sorted(MISTAKES.keys() - {"traced by torch.fx"})


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_call_says_the_same(name: str) -> None:
    """torch.compile wraps the error in one of its own, which quotes the message."""
    call, kind, words, _ = MISTAKES[name]
    if name == "a backend that cannot" and native.why_not() is not None:
        pytest.skip("no compiled part")
    torch._dynamo.reset()
    with pytest.raises((kind, torch._dynamo.exc.Unsupported)) as caught:
        torch.compile(call, fullgraph=True, backend="aot_eager")()
    said = str(caught.value).replace("\\n", "\n").replace("\\'", "'")
    first = words.split("attention on")[0]  # a compiled call is not described by its sizes
    assert re.search(first, said)
