"""timm's modules, known by their code; timm itself wants torchvision, and stays out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import fuse, unfuse
from tests.cases.calls import counted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return counted(monkeypatch)


def fast_layer_norm(x: Tensor, *rest: Any) -> Tensor:
    raise AssertionError("only where `_fast_norm` is on")


def fast_rms_norm(x: Tensor, *rest: Any) -> Tensor:
    raise AssertionError("only where `_fast_norm` is on")


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


# As timm has them.
class LayerNorm(nn.LayerNorm):
    _fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x


class LayerNorm2d(nn.LayerNorm):
    _fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        x = x.permute(0, 3, 1, 2)
        return x


class LayerNormFp32(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() if self.weight is not None else None
        bias = self.bias.float() if self.bias is not None else None
        x = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        return x


class RmsNorm(nn.Module):
    _fast_norm = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (width,), 1e-6
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        if self._fast_norm:
            x = fast_rms_norm(x, self.normalized_shape, self.weight, self.eps)
        else:
            x = rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return x


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)
        self.act, self.drop1, self.drop2 = nn.GELU(), nn.Dropout(0.0), nn.Dropout(0.0)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x


@pytest.fixture
def of_timm() -> Iterator[None]:
    for function in (fast_layer_norm, fast_rms_norm, rms_norm):
        function.__module__ = "timm.layers.fast_norm"
    yield
    for function in (fast_layer_norm, fast_rms_norm, rms_norm):
        function.__module__ = __name__


TIMM = {
    "LayerNorm": (lambda: LayerNorm(16), (2, 5, 16)),
    "LayerNorm2d": (lambda: LayerNorm2d(16), (2, 16, 3, 4)),
    "LayerNormFp32": (lambda: LayerNormFp32(16), (2, 5, 16)),
    "RmsNorm": (lambda: RmsNorm(16), (2, 5, 16)),
    "Mlp": (lambda: Mlp(16), (2, 5, 16)),
}


@pytest.mark.usefixtures("of_timm")
@pytest.mark.parametrize("name", TIMM)
def test_modules_of_timm(name: str, calls: list[str]) -> None:
    make, shape = TIMM[name]
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, requires_grad=True)
    expected = module(x)
    [wanted] = torch.autograd.grad(expected.sin().sum(), x)
    calls.clear()
    report = fuse(module)
    assert [swap.before for swap in report.swapped] == [name]
    found = module(x)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    [gradient] = torch.autograd.grad(found.sin().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    unfuse(module)
    assert type(module).__name__ == name


def test_what_timm_does_otherwise_stays(of_timm: None) -> None:
    fast = LayerNorm(16)
    fast._fast_norm = True
    [left] = fuse(fast).left_alone
    assert "`_fast_norm` is on" in left.reason
    rms_norm.__module__ = "somewhere"
    [left] = fuse(RmsNorm(16)).left_alone
    assert "calls a function of its own" in left.reason
