"""`fused_attn.debug`: off and silent by default; on, one warning a kind, and a way out."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import (
    FusedMultiheadAttention,
    FusedTransformer,
    FusedTransformerDecoderLayer,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
)
from fused_attn.runtime import debug as switch

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, L, D, E = 3, 4, 5, 8, 16
PADDING = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None]  # True = padding


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    fused_attn.debug(True)
    yield
    fused_attn.debug(False)


def attend(shape: tuple[int, ...] = (B, H, L, D), **arguments: Any) -> Tensor:
    q = torch.randn(shape)
    return fused_attn.attention(q, q, q, **arguments)


def layer(module: Any, **arguments: Any) -> Any:
    x = torch.randn(B, L, E)
    inputs = {FusedMultiheadAttention: [x] * 3, FusedTransformerDecoderLayer: [x, x]}
    return module(*inputs.get(type(module), [x]), **arguments)


def varlen(**lengths: Any) -> Tensor:
    q = torch.randn(L, H, D)
    starts = {name: torch.tensor(value, dtype=torch.int32) for name, value in lengths.items()}
    return fused_attn.attention_varlen(q, q, q, **starts, max_seqlen_q=L, max_seqlen_k=L)


ENCODER_LAYER = functools.partial(FusedTransformerEncoderLayer, E, H, 8, batch_first=True)
ATTENTION = functools.partial(FusedMultiheadAttention, E, H, batch_first=True)
FAR = torch.full((L, L), -torch.inf)

# What somebody does, and the warning's words and hint.
LIKELY_WRONG: dict[str, tuple[Callable[[], Any], str, str]] = {
    "inverted padding mask of a function": (
        lambda: attend(key_padding_mask=torch.tensor([[False] * L] * B)),
        "a call of attention: all of batch element 0, 1, 2 is hidden",
        "True = visible in functions"),
    "one element only": (
        lambda: attend(key_padding_mask=PADDING), "batch element 0 is hidden", "`~mask`"),
    "mask of a function": (
        lambda: attend(mask=torch.zeros(L, L, dtype=torch.bool)), "element 0, 1, 2 is", "`~mask`"),
    "two masks together": (
        lambda: attend(mask=torch.eye(L, dtype=torch.bool)[0], key_padding_mask=PADDING),
        "batch element 0, 1, 2 is hidden", "`~mask`"),
    "bias": (lambda: attend(bias=FAR), "batch element 0, 1, 2 is hidden", "`~mask`"),
    "lengths": (
        lambda: attend(key_lengths=torch.tensor([5, 0, 1])), "batch element 1 is", "`~mask`"),
    "packed": (
        lambda: varlen(cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 5, 5]),
        "attention_varlen: all of batch element 1", "`cu_seqlens_k` holds"),
    "scaled_dot_product_attention": (
        lambda: fused_attn.scaled_dot_product_attention(
            *[torch.randn(B, H, L, D)] * 3, attn_mask=torch.zeros(L, L, dtype=torch.bool)),
        "batch element 0, 1, 2 is hidden", "`~mask`"),
    "heads and positions": (
        lambda: attend((B, 64, H, D)), "q (3, 64, 4, 8), (B, H, L, D), has 64 heads of 4 positions",
        '`layout="blhd"`, or `x.transpose(1, 2)`'),
    "inverted padding mask of attention": (
        lambda: layer(ATTENTION(), key_padding_mask=~PADDING),
        "FusedMultiheadAttention: all of batch element 0 is", "True = hidden in modules"),
    "all-True module mask": (
        lambda: layer(ATTENTION(), attn_mask=torch.ones(L, L, dtype=torch.bool)),
        "FusedMultiheadAttention: all of batch element 0, 1, 2", "True = hidden in modules"),
    "floating module mask": (
        lambda: layer(ATTENTION(), attn_mask=FAR), "batch element 0, 1, 2", "True = hidden"),
    "inverted padding mask of a layer": (
        lambda: layer(ENCODER_LAYER(), src_key_padding_mask=~PADDING),
        "FusedTransformerEncoderLayer: all of batch element 0 is", "True = hidden in modules"),
    "of a stack": (
        lambda: layer(FusedTransformerEncoder(ENCODER_LAYER(), 1, enable_nested_tensor=False),
                      src_key_padding_mask=~PADDING),
        "FusedTransformerEncoder: all of batch element 0 is", "True = hidden in modules"),
    "of the memory": (
        lambda: layer(FusedTransformerDecoderLayer(E, H, 8, batch_first=True),
                      memory_key_padding_mask=~PADDING),
        "FusedTransformerDecoderLayer: all of batch element 0 is", "True = hidden in modules"),
    "forgotten memory_key_padding_mask": (
        lambda: FusedTransformer(E, H, 1, 1, 8, batch_first=True)(
            *[torch.randn(B, L, E)] * 2, src_key_padding_mask=PADDING),
        "no `memory_key_padding_mask`", "`memory_key_padding_mask=src_key_padding_mask`"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKELY_WRONG)
def test_it_warns_once_a_kind_with_the_way_out_and_not_when_off(name: str) -> None:
    call, words, hint = LIKELY_WRONG[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    [warning] = caught
    assert warning.filename == __file__
    first, last = str(warning.message).splitlines()
    assert words in first
    assert last.startswith("hint: ")
    assert hint in last
    fused_attn.debug(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


FINE: dict[str, Callable[[], Any]] = {
    "plain": attend,
    "padding": lambda: attend(key_padding_mask=~PADDING),
    "first step of generation": lambda: fused_attn.attention(*[torch.randn(B, 64, 1, D)] * 3),
    "later step": lambda: fused_attn.attention(
        torch.randn(B, 32, 1, D), *[torch.randn(B, 32, 40, D)] * 2
    ),
    "a layout that was said": lambda: attend((B, 2, 64, D), layout="blhd"),
    "short sequences in a module of many heads": lambda: FusedMultiheadAttention(64, 32)(
        *[torch.randn(2, B, 64)] * 3
    ),
    "module": lambda: layer(ATTENTION(), key_padding_mask=PADDING),
    "appended keys": lambda: layer(
        ATTENTION(add_zero_attn=True), attn_mask=torch.ones(L, L, dtype=torch.bool)
    ),
    "layer": lambda: layer(ENCODER_LAYER(), src_key_padding_mask=PADDING),
    "no keys": lambda: fused_attn.attention(
        torch.randn(B, H, L, D), *[torch.randn(B, H, 0, D)] * 2
    ),
    "compiled": lambda: torch.compile(attend, backend="eager")(key_padding_mask=PADDING),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_right_raises_no_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        FINE[name]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", [
    {"mask": torch.zeros(3, 3, dtype=torch.bool)}, {"key_padding_mask": torch.zeros(9, L) > 1},
    {"mask": torch.zeros(L, L)},
])  # fmt: skip
def test_wrong_calls_still_raise_what_they_raise(arguments: dict) -> None:
    with pytest.raises((TypeError, ValueError)):
        attend(**arguments)


def test_results_do_not_change() -> None:
    q = torch.randn(B, H, L, D)
    with pytest.warns(UserWarning, match="batch element 0"):
        out = fused_attn.attention(q, q, q, key_padding_mask=PADDING)
    fused_attn.debug(False)
    assert torch.equal(out, fused_attn.attention(q, q, q, key_padding_mask=PADDING))


def test_switch_takes_a_bool() -> None:
    with pytest.raises(TypeError, match="`on` must be a bool, got str 'yes'"):
        fused_attn.debug("yes")


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), (None, "False")])
def test_environment_switches_it_on(value: str | None, expected: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != switch.VARIABLE}
    if value is not None:
        environment[switch.VARIABLE] = value
    code = "from fused_attn.runtime import debug; print(debug.enabled)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == expected
