"""`weight_offset`: weights that say what they differ from 1 by (Gemma)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.testing import check_against_oracle
from tests.cases.layer_norm import served_dtypes

FORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


def ours(
    form: str, backend: str, x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor]:
    rows = (x,) if residual is None else (x, residual)
    function = getattr(fused_attn, form)
    return (function(*rows, 33, weight, eps=1e-5, weight_offset=1.0, backend=backend),)


def formula(form: str, offset: float) -> Callable[..., tuple[Tensor]]:
    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor]:
        h = x if residual is None else x + residual
        if "layer" in form:
            h = h - h.mean(-1, keepdim=True)
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * (weight + offset),)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_added_to_the_weight(layer_norm_backend: str, dtype: torch.dtype) -> None:
    if dtype not in served_dtypes(layer_norm_backend):
        pytest.skip(f"{layer_norm_backend} does not serve {dtype}")
    for form in FORMS:
        run = functools.partial(ours, form, layer_norm_backend)
        tensors = {"x": torch.randn(5, 33, dtype=dtype), "weight": torch.randn(33, dtype=dtype)}
        if "add" in form:
            tensors["residual"] = torch.randn(5, 33, dtype=dtype)
        for tensor in tensors.values():
            tensor.requires_grad_()
        check_against_oracle(run, formula(form, 1.0), tensors, ("y",))


def test_the_sum_is_not_rounded_to_16_bits(layer_norm_backend: str) -> None:
    """A weight of 2^-12 is lost beside 1 in bfloat16."""
    x = torch.ones(1, 8).to(torch.float32)
    weight = torch.full((8,), 2.0**-12, dtype=torch.bfloat16)
    y = fused_attn.rms_norm(x, 8, weight, eps=1e-12, weight_offset=1.0, backend=layer_norm_backend)
    torch.testing.assert_close(y, torch.full_like(y, 1 + 2.0**-12), rtol=1e-6, atol=0)


def test_it_compiles_and_writes_in_place() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(4, 16), torch.randn(16)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return fused_attn.rms_norm(x, 16, weight, weight_offset=1.0)

    expected = run(x, weight)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), expected)
    fused_attn.rms_norm(x, 16, weight, weight_offset=1.0, out=x)
    torch.testing.assert_close(x, expected)


def test_mistakes_are_named() -> None:
    x, weight = torch.randn(4, 16), torch.randn(16)
    with pytest.raises(ValueError, match="`weight_offset` must be 0 where `weight` is None, got 1"):
        fused_attn.rms_norm(x, 16, weight_offset=1.0)
    with pytest.raises(TypeError, match="`weight_offset` must be a number, got NoneType"):
        fused_attn.layer_norm(x, 16, weight, weight_offset=None)
    with pytest.raises(ValueError, match="`weight_offset` must be finite"):
        fused_attn.layer_norm(x, 16, weight, weight_offset=float("nan"))
    with pytest.raises(TypeError, match=r"`weight` must be torch\.float32"):
        fused_attn.rms_norm(x, 16, weight.int(), weight_offset=1.0)
    with pytest.raises(ValueError, match=r"`weight` must have shape normalized_shape = \(16,\)"):
        fused_attn.add_rms_norm(x, x, 16, weight[:8], weight_offset=1.0)
