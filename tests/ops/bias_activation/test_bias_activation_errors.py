"""A caller's mistake: the error names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fused_attn import UnsupportedError, bias_activation

MISTAKES = {
    "x type": ({"x": [1.0]}, TypeError, r"`x` must be a tensor, got list"),
    "x integer": ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, r"`x` must be .*int64"),
    "x rank": ({"x": torch.ones(())}, ValueError, r"`x` must have at least 1 dimension, got shape \(\)"),
    "x odd": ({"x": torch.ones(3, 7), "gated": True}, ValueError, r"`x` must have an even last dimension where `gated` is True, got shape \(3, 7\)"),
    "bias type": ({"bias": 1.0}, TypeError, r"`bias` must be a tensor, got float 1.0"),
    "bias shape": ({"bias": torch.ones(4)}, ValueError, r"`bias` must have shape \(x.shape\[-1\],\) = \(8,\), got \(4,\)"),
    "bias integer": ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, r"`bias` must be"),
    "bias device": ({"bias": torch.ones(8, device="meta")}, ValueError, r"`bias` must be on cpu, got meta"),
    "activation": ({"activation": "tanh"}, ValueError, r"`activation` must be one of 'relu', .* got 'tanh'"),
    "activation type": ({"activation": torch.relu}, ValueError, r"`activation` must be one of"),
    "gated": ({"gated": 1}, TypeError, r"`gated` must be a bool, got int 1"),
    "dropout": ({"dropout_p": 1.5}, ValueError, r"`dropout_p` must be in \[0, 1\], got 1.5"),
    "rng dtype": ({"dropout_p": 0.1, "dropout_rng": torch.ones(2)}, TypeError, r"`dropout_rng` must be torch.int64"),
    "rng shape": ({"dropout_p": 0.1, "dropout_rng": torch.ones(3, dtype=torch.int64)}, ValueError, r"`dropout_rng` must have shape"),
    "backend": ({"backend": "cdua"}, ValueError, r"`backend` must be one of .* got 'cdua'"),
    "out shape": ({"out": torch.empty(3, 9)}, ValueError, r"`out` must have shape of the result = \(3, 8\)"),
    "out dtype": ({"out": torch.empty(3, 8).half()}, TypeError, r"`out` must be torch.float32"),
    "out gradient": (
        {"out": torch.zeros(3, 8), "bias": torch.ones(8, requires_grad=True)},
        ValueError,
        r"`out` must be None where a gradient is wanted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    changes, kind, message = MISTAKES[name]
    arguments = {"x": torch.randn(3, 8), "bias": torch.randn(8), "activation": "relu"} | changes
    with pytest.raises(kind, match=message):
        bias_activation(**arguments)


def test_no_backend_lists_every_reason() -> None:
    x = torch.zeros(2, 2, device="meta")
    with pytest.raises(UnsupportedError, match="needs tensors on the CPU, these are on meta"):
        bias_activation(x, activation="silu", backend="cpu")
    assert bias_activation(x, activation="silu").is_meta
