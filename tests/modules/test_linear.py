"""Linears of the modules, and `fuse(model, linears=True)`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import FusedLinear
from fused_attn.ops import dispatch
from fused_attn.ops.linear import measured
from fused_attn.runtime import native

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")


@pytest.fixture(params=[False, True], ids=["torch's", "ours"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whichever this machine would take: once torch's product, once ours."""
    if request.param and native.why_not() is not None:
        pytest.skip("no compiled part")
    why = None if request.param else "the test wants torch's"
    monkeypatch.setattr(measured, "why_torch", lambda problem: why)
    dispatch.forget_plans()
    return request.param


MODULES: dict[str, tuple[Any, int]] = {
    "attention": (lambda: fused_attn.FusedMultiheadAttention(16, 2, batch_first=True), 4),
    "feed-forward": (lambda: fused_attn.FusedFeedForward(16, 32, activation="swiglu"), 2),
    "encoder layer": (
        lambda: fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True), 4),
    "decoder layer": (
        lambda: fused_attn.FusedTransformerDecoderLayer(16, 2, 32, batch_first=True), 7),
}  # fmt: skip


def call(name: str, module: nn.Module, x: Tensor) -> Tensor:
    if name == "attention":
        return module(x, x, x, need_weights=False)[0]
    return module(x, x) if name == "decoder layer" else module(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_products_of_modules(name: str, dtype: torch.dtype, ours: bool) -> None:
    """As exact as torch's modules, training and inference."""
    torch.manual_seed(0)
    module = MODULES[name][0]().eval()
    exact = copy.deepcopy(module).double()
    x = torch.randn(3, 7, 16).to(dtype)
    module.to(dtype)
    heard: list[Any] = []
    with dispatch.watching(heard.append):
        y = call(name, module, x)
    chosen = [each.chosen for each in heard if str(getattr(each, "problem", each))[:6] == "linear"]
    assert len(chosen) >= 1
    assert set(chosen) == {"cpu" if ours else "torch"}
    torch.testing.assert_close(y.double(), call(name, exact, x.double()), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_linear_with_a_hook_is_called(ours: bool) -> None:
    layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True).bfloat16().eval()
    seen = []
    for child in (layer.linear1, layer.linear2, layer.self_attn.out_proj):
        child.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(2, 5, 16).bfloat16())
    assert len(seen) == 3


def test_float32_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "why_torch", None)  # to call it would be an error
    layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    layer(torch.randn(2, 5, 16))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)
        self.head = nn.Linear(24, 5, bias=False)
        self.special = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.first(x)))


def test_fuse_swaps_linears_where_it_is_asked_to() -> None:
    model = Model().eval()
    x = torch.randn(2, 5, 16)
    expected, names = model(x), set(model.state_dict())
    assert all("Linear" not in s.before for s in fused_attn.fuse(copy.deepcopy(model)).swapped)
    report = fused_attn.fuse(model, linears=True, skip="head")
    assert type(model.first) is FusedLinear
    assert type(model.layer.linear1) is FusedLinear
    assert type(model.head) is nn.Linear
    assert "LazyLinear" in str(report)
    assert "subclass" in str(report)
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == names
    fused_attn.unfuse(model)
    assert type(model.first) is nn.Linear
    assert type(model.layer.linear1) is nn.Linear
    with pytest.raises(TypeError, match="`linears` must be a bool"):
        fused_attn.fuse(model, linears=1)


@needs_kernels
def test_a_packed_batch_uses_the_same_products(ours: bool) -> None:
    layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True).bfloat16().eval()
    x = torch.randn(3, 7, 16).bfloat16()
    padding = torch.arange(7)[None] >= torch.tensor([7, 4, 2])[:, None]
    y = layer(x, src_key_padding_mask=padding)
    alone = layer(x[1:2, :4])
    torch.testing.assert_close(y[1, :4], alone[0], rtol=0.03, atol=0.03)
    assert (y[padding] == 0).all()


def test_fused_linear_takes_what_torchs_takes() -> None:
    linear = FusedLinear(4, 3)
    for x in (torch.randn(4), torch.randn(2, 0, 4), torch.randn(2, 3, 4)):
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    assert linear(nested).is_nested
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 5))
    with pytest.raises(NotImplementedError, match="cannot compile FusedLinear"):
        torch.jit.script(linear)
