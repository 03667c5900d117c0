"""Layers in 16 bits are as close to float64 as torch.nn's: output and every gradient.

A unit that rounding puts on the wrong side of ReLU's kink loses its whole gradient. Both make such
errors, so they are taken together over random layers, as a root of summed squares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import FusedFeedForward, fuse
from fused_attn.ops import dispatch
from fused_attn.ops.linear import measured
from fused_attn.runtime import native

pytestmark = pytest.mark.usefixtures("one_thread")

N, L, S, E, H, FF = 4, 16, 12, 32, 4, 64
SEEDS = 12
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.1, std=0.3)
    return module


def tensors_of(run: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of inputs and parameters, in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    grads = torch.autograd.grad(out, [*leaves, *module.parameters()], weights)
    return [t.detach().double() for t in (out, *grads)]


def errors(make: Callable[[], tuple[nn.Module, nn.Module, list[Tensor]]]) -> list[list[float]]:
    """Errors of ours and of stock against float64, of each tensor, over random layers."""
    sums: list[Tensor] = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        ours, stock, inputs = make()
        exact = copy.deepcopy(stock).double()
        right = tensors_of(exact, exact, [x.double() for x in inputs])
        each = [
            torch.stack([(a - b).square().sum() for a, b in zip(actual, right, strict=True)])
            for actual in (tensors_of(m, m, inputs) for m in (ours, stock))
        ]
        sums.append(torch.stack(each))
    return torch.stack(sums).sum(0).sqrt().tolist()


def check(make: Callable[[], tuple[nn.Module, nn.Module, list[Tensor]]]) -> None:
    _, stock, inputs = make()
    names = ["output", *(f"input {i}" for i in range(len(inputs)))]
    names += [name for name, _ in stock.named_parameters()]
    for name, mine, theirs in zip(names, *errors(make), strict=True):
        assert mine <= 2.0 * theirs, f"{name}: error {mine:.3g}, stock's {theirs:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layer(kind: str, activation: str, norm_first: bool, dtype: torch.dtype) -> None:
    cls = nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer

    def make() -> tuple[nn.Module, nn.Module, list[Tensor]]:
        settings = {"batch_first": True, "norm_first": norm_first}
        stock = cls(E, H, FF, 0.0, ACTIVATIONS[activation], **settings)
        stock = randomized(stock).to(dtype)
        ours = copy.deepcopy(stock)
        fuse(ours)
        inputs = [torch.randn(N, L, E).to(dtype)]
        if kind == "decoder":
            inputs.append(torch.randn(N, S, E).to(dtype))
        return ours, stock, inputs

    check(make)


class Plain(nn.Module):
    """A feed-forward of torch's operations, with the parameters of ours."""

    def __init__(self, ours: FusedFeedForward, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear1, self.linear2 = copy.deepcopy(ours.linear1), copy.deepcopy(ours.linear2)
        self.gated, self.activation = ours.gated, activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear1(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return self.linear2(self.activation(gate) * up)
        return self.linear2(self.activation(h))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "activation"), [
    ("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu), ("reglu", F.relu), ("swiglu", F.silu),
    ("geglu", F.gelu),
])  # fmt: skip
def test_feed_forward(
    name: str, activation: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    def make() -> tuple[nn.Module, nn.Module, list[Tensor]]:
        ours = randomized(FusedFeedForward(E, FF, 0.0, name)).to(dtype)
        return ours, Plain(ours, activation), [torch.randn(N, L, E).to(dtype)]

    check(make)


def test_autocast_puts_the_bias_into_the_product_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "why_torch", lambda problem: "to be equal bit by bit")
    dispatch.forget_plans()
    ours = randomized(FusedFeedForward(E, FF, 0.0, "relu"))
    stock, x = Plain(ours, F.relu), torch.randn(N, L, E)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [ours(x), stock(x)]
    assert torch.equal(*outputs)
    grads = [
        torch.autograd.grad(out.float().sin().sum(), list(module.parameters()))
        for out, module in zip(outputs, (ours, stock), strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


def test_units_at_0_stay_on_the_side_of_the_sum_rounded_once() -> None:
    """1 + 2⁻⁹ is no bfloat16: rounded before −1 is added it is 0, and ReLU's gradient is lost."""
    ours = FusedFeedForward(2, 1, 0.0, "relu", dtype=torch.bfloat16)
    with torch.no_grad():
        ours.linear1.weight.copy_(torch.tensor([[1.0, 2.0**-9]]))
        ours.linear1.bias.fill_(-1.0)
        ours.linear2.weight.fill_(1.0)
        ours.linear2.bias.zero_()
    x = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    ours(x).sum().backward()
    assert ours.linear1.bias.grad.item() == 2.0  # both outputs see the unit
    assert x.grad[0, 0].item() == 2.0


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_inference_is_one_pass_where_ours_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Product, activation and gate are one call; with a gradient they are two."""
    monkeypatch.setattr(measured, "why_torch", lambda problem: None)
    module = FusedFeedForward(E, FF, dropout=0.0, activation="swiglu").bfloat16()
    x = torch.randn(N, L, E).bfloat16()
    dispatch.forget_plans()
    names = ("linear", "bias_activation", "linear")
    told = fused_attn.explain(module, x)
    assert tuple(str(call.problem).split(" ")[0] for call in told.calls) == names
    expected = module(x)
    with torch.no_grad():
        told = fused_attn.explain(module, x)
        assert [str(call.problem).split(" ")[0] for call in told.calls] == ["linear", "linear"]
        assert "activation='silu', gated" in str(told)
        torch.testing.assert_close(module(x), expected, rtol=3e-2, atol=3e-2)
    dispatch.forget_plans()
