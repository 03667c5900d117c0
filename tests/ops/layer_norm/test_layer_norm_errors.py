"""A caller's mistake: the error names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fused_attn import add_layer_norm, layer_norm, rms_norm

MISTAKES = {
    "x type": ({"x": [1.0]}, TypeError, r"`x` must be a tensor, got list"),
    "x integer": ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, r"`x` must be .*int64"),
    "x complex": ({"x": torch.ones(3, 8) * 1j}, TypeError, r"`x` must be .*complex64"),
    "x shape": ({"x": torch.ones(3, 7)}, ValueError, r"`x` must end in `normalized_shape` \(8,\), got shape \(3, 7\)"),
    "x rank": ({"x": torch.ones(())}, ValueError, r"`x` must end in `normalized_shape`"),
    "shape empty": ({"normalized_shape": ()}, ValueError, r"`normalized_shape` must be an integer .* got \(\)"),
    "shape text": ({"normalized_shape": "8"}, ValueError, r"`normalized_shape` must be .* got '8'"),
    "shape float": ({"normalized_shape": (8.0,)}, ValueError, r"`normalized_shape` must be"),
    "residual type": ({"residual": 1.0}, TypeError, r"`residual` must be a tensor, got float 1.0"),
    "residual shape": ({"residual": torch.ones(8)}, ValueError, r"`residual` must have shape of `x` = \(3, 8\), got \(8,\)"),
    "residual integer": ({"residual": torch.ones(3, 8, dtype=torch.int32)}, TypeError, r"`residual` must be"),
    "residual device": ({"residual": torch.ones(3, 8, device="meta")}, ValueError, r"`residual` must be on cpu"),
    "weight shape": ({"weight": torch.ones(7)}, ValueError, r"`weight` must have shape normalized_shape = \(8,\), got \(7,\)"),
    "weight dtype": ({"weight": torch.ones(8).bfloat16()}, TypeError, r"`weight` must be torch.float32, got torch.bfloat16"),
    "weight type": ({"weight": 1}, TypeError, r"`weight` must be a tensor"),
    "bias shape": ({"bias": torch.ones(3, 8)}, ValueError, r"`bias` must have shape"),
    "bias dtype": ({"bias": torch.ones(8).double()}, TypeError, r"`bias` must be torch.float32, got"),
    "bias device": ({"bias": torch.ones(8, device="meta")}, ValueError, r"`bias` must be on cpu"),
    "eps text": ({"eps": "1"}, TypeError, r"`eps` must be a number, got str '1'"),
    "eps nan": ({"eps": float("nan")}, ValueError, r"`eps` must be finite, got nan"),
    "dropout": ({"dropout_p": 1.5}, ValueError, r"`dropout_p` must be in \[0, 1\], got 1.5"),
    "rng dtype": ({"dropout_p": 0.1, "dropout_rng": torch.ones(2)}, TypeError, r"`dropout_rng` must be torch.int64"),
    "rng shape": ({"dropout_p": 0.1, "dropout_rng": torch.ones(3, dtype=torch.int64)}, ValueError, r"`dropout_rng` must have shape"),
    "backend": ({"backend": "cdua"}, ValueError, r"`backend` must be one of .* got 'cdua'"),
    "out shape": ({"out": torch.empty(3, 9)}, ValueError, r"`out` must have shape of `x` = \(3, 8\)"),
    "out dtype": ({"out": torch.empty(3, 8).half()}, TypeError, r"`out` must be torch.float32"),
    "sum_out shape": ({"sum_out": torch.empty(8)}, ValueError, r"`sum_out` must have shape"),
    "out gradient": (
        {"out": torch.zeros(3, 8), "weight": torch.ones(8, requires_grad=True)},
        ValueError,
        r"`out` must be None where a gradient is wanted",
    ),
    "sum_out gradient": (
        {"sum_out": torch.zeros(3, 8), "x": torch.ones(3, 8, requires_grad=True)},
        ValueError,
        r"`sum_out` must be None where a gradient is wanted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    changes, kind, message = MISTAKES[name]
    arguments = {"x": torch.randn(3, 8), "residual": torch.randn(3, 8), "normalized_shape": 8}
    arguments |= changes
    with pytest.raises(kind, match=message):
        add_layer_norm(**arguments)


def test_mixed_dtypes_follow_torch() -> None:
    """LayerNorm's parameters may be wider than a 16-bit x; RMSNorm's may be anything."""
    x, narrow = torch.randn(3, 8), torch.ones(8).bfloat16()
    with pytest.raises(TypeError, match=r"`weight` must be torch.float32"):
        layer_norm(x, 8, narrow)
    with pytest.raises(TypeError, match=r"`weight` must be torch.bfloat16 or torch.float32"):
        layer_norm(x.bfloat16(), 8, torch.ones(8).half())
    assert layer_norm(x.bfloat16(), 8, torch.ones(8)).dtype == torch.bfloat16
    assert rms_norm(x, 8, narrow).dtype == torch.float32


def test_nothing_is_written_after_a_mistake() -> None:
    out = torch.full((3, 8), 7.0)
    with pytest.raises(ValueError, match="eps"):
        layer_norm(torch.randn(3, 8), 8, eps=float("inf"), out=out)
    assert torch.equal(out, torch.full((3, 8), 7.0))
