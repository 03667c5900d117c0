"""Faulty calls of FusedMultiheadAttention: torch.nn's exception types, one text in every mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention
from tests.cases.mha import E, H, L, N, S, pair


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*(shape or (N, L, E)), dtype=dtype)


# fault: (type, text, arguments after the three inputs or instead of them, settings of the module)
FAULTS: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "query is no tensor": (
        TypeError, "`query` must be a tensor, got list", lambda: {"query": [1.0]}, {}),
    "query 4-D": (
        AssertionError, "received 4-D query tensor", lambda: {"query": x(1, N, L, E)}, {}),
    "query 1-D": (AssertionError, "received 1-D query tensor", lambda: {"query": x(E)}, {}),
    "key rank": (
        AssertionError, "expected `key` and `value` to be 3-D but found 2-D and 3-D tensors",
        lambda: {"key": x(L, E)}, {}),
    "value rank, unbatched": (
        AssertionError, "expected `key` and `value` to be 2-D but found 2-D and 3-D tensors",
        lambda: {"query": x(L, E), "key": x(S, E)}, {}),
    "embedding size": (
        AssertionError, f"was expecting embedding dimension of {E}, but got 6",
        lambda: {"query": x(N, L, 6)}, {}),
    "key and value differ": (
        AssertionError, "does not match value shape", lambda: {"key": x(N, S, E)}, {}),
    "key and value differ, own dims": (
        AssertionError, "do not match value's",
        lambda: {"key": x(N, S, 6), "value": x(N, L, 5)}, {"kdim": 6, "vdim": 5}),
    "batch of key": (
        RuntimeError, f"must have the batch size of `query`, {N}, got 4",
        lambda: {"key": x(4, L, E), "value": x(4, L, E)}, {}),
    "features of key": (
        RuntimeError, f"`key` must have {E} features",
        lambda: {"key": x(N, L, 6), "value": x(N, L, 6)}, {}),
    "features of key, own dims": (
        AssertionError, "`key` must have 6 features", dict, {"kdim": 6, "vdim": 5}),
    "dtype of query": (
        RuntimeError, "`query` must have the dtype of the module's weights, torch.float32",
        lambda: dict.fromkeys(("query", "key", "value"), x(dtype=torch.float64)), {}),
    "integer query": (
        RuntimeError, "got torch.int64",
        lambda: dict.fromkeys(("query", "key", "value"), x(dtype=torch.int64)), {}),
    "complex query": (
        NotImplementedError, "must be of a real floating dtype",
        lambda: dict.fromkeys(("query", "key", "value"), x(dtype=torch.complex64)), {}),
    "padding rank": (
        AssertionError, "expected `key_padding_mask` to be `None` or 2-D but found 1-D tensor",
        lambda: {"key_padding_mask": x(L) > 0}, {}),
    "padding rank, unbatched": (
        AssertionError, "expected `key_padding_mask` to be `None` or 1-D but found 2-D tensor",
        lambda: {n: x(L, E) for n in ("query", "key", "value")}
        | {"key_padding_mask": x(N, L) > 0}, {}),
    "padding size": (
        AssertionError, f"`key_padding_mask` shape to be ({N}, {L}) but got ({N}, {S})",
        lambda: {"key_padding_mask": x(N, S) > 0}, {}),
    "padding batch": (
        AssertionError, f"`key_padding_mask` shape to be ({N}, {L}) but got (1, {L})",
        lambda: {"key_padding_mask": x(1, L) > 0}, {}),
    "mask rank": (
        AssertionError, "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor",
        lambda: {"attn_mask": x(L) > 0}, {}),
    "mask 2-D size": (
        RuntimeError, f"The shape of the 2D attn_mask is ({L}, {S}), but should be ({L}, {L})",
        lambda: {"attn_mask": x(L, S)}, {}),
    "mask 3-D size": (
        RuntimeError,
        f"The shape of the 3D attn_mask is ({N}, {L}, {L}), but should be ({N * H}, {L}, {L})",
        lambda: {"attn_mask": x(N, L, L)}, {}),
    "mask 3-D size, unbatched": (
        AssertionError, f"Expected `attn_mask` shape to be ({H}, {L}, {L}) but got (5, {L}, {L})",
        lambda: {n: x(L, E) for n in ("query", "key", "value")} | {"attn_mask": x(5, L, L)}, {}),
    "integer mask": (
        AssertionError, "only bool and floating types of attn_mask are supported, got torch.int32",
        lambda: {"attn_mask": x(L, L, dtype=torch.int32)}, {}),
    "integer padding": (
        AssertionError, "only bool and floating types of key_padding_mask are supported",
        lambda: {"key_padding_mask": x(N, L, dtype=torch.uint8)}, {}),
    "mask is no tensor": (
        TypeError, "`attn_mask` must be a tensor, got list", lambda: {"attn_mask": [0.0]}, {}),
    "float64 mask": (
        RuntimeError, "Expected attn_mask dtype to be torch.bool or torch.float32, but got",
        lambda: {"attn_mask": x(L, L, dtype=torch.float64)}, {}),
    "float16 padding": (
        RuntimeError, "Expected key_padding_mask dtype to be torch.bool or torch.float32",
        lambda: {"key_padding_mask": x(N, L, dtype=torch.float16)}, {}),
}  # fmt: skip

# torch.nn accepts what is a fault here, or gives another type in one of its paths.
ONLY_OURS = {"query is no tensor"}


def call(module: nn.Module, build: Callable[[], dict[str, Any]], **more: Any) -> None:
    arguments = dict.fromkeys(("query", "key", "value"), x())
    arguments |= build()
    module(**arguments, **more)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_raises_one_text_in_every_mode(fault: str, mode: str, need_weights: bool) -> None:
    kind, text, build, settings = FAULTS[fault]
    dtype = torch.complex64 if "complex" in fault else torch.float32
    ours = FusedMultiheadAttention(E, H, batch_first=True, dtype=dtype, **settings)
    ours.train(mode == "train")
    with torch.set_grad_enabled(mode == "train"), pytest.raises(kind, match=re.escape(text)):
        call(ours, build, need_weights=need_weights)


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - ONLY_OURS))
def test_torch_raises_the_same_type(fault: str) -> None:
    kind, _, build, settings = FAULTS[fault]
    dtype = torch.complex64 if "complex" in fault else torch.float32
    stock = nn.MultiheadAttention(E, H, batch_first=True, dtype=dtype, **settings)
    with pytest.raises(kind):
        call(stock, build, need_weights=False)


def test_4d_mask_must_broadcast() -> None:
    _, ours = pair(E, H, batch_first=True)
    with pytest.raises(AssertionError, match=re.escape(f"broadcastable to ({N}, {H}, {L}, {L})")):
        ours(x(), x(), x(), attn_mask=x(N, 3, L, L))


@pytest.mark.parametrize(("arguments", "kind"), [
    ((0, 1), ValueError), ((8, 0), ValueError), ((-8, 2), ValueError), ((10, 4), AssertionError),
])  # fmt: skip
def test_constructor_raises_as_torch(arguments: tuple[int, int], kind: type[Exception]) -> None:
    for cls in (nn.MultiheadAttention, FusedMultiheadAttention):
        with pytest.raises(kind):
            cls(*arguments)


def test_dropout_out_of_range_is_found_when_it_acts() -> None:
    _, ours = pair(E, H, dropout=2.0, batch_first=True)
    ours.eval()(x(), x(), x())
    with pytest.raises(ValueError, match="must be in"):
        ours.train()(x(), x(), x())


def test_lone_bias_k_is_refused() -> None:
    _, ours = pair(E, H, batch_first=True)
    ours.bias_k = nn.Parameter(torch.zeros(1, 1, E))
    with pytest.raises(AssertionError, match="bias_k and bias_v must be set together"):
        ours(x(), x(), x())


def test_unknown_backend_is_named() -> None:
    _, ours = pair(E, H, batch_first=True)
    ours.backend = "abacus"
    with pytest.raises(ValueError, match="abacus"):
        ours(x(), x(), x())


def test_masks_of_different_types_raise_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    _, ours = pair(E, H, batch_first=True)
    ours(x(), x(), x(), key_padding_mask=x(N, L) > 1, attn_mask=x(L, L))
    assert not recwarn.list
