"""What comes after a linear's product: activation, gate, dropout, residual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.runtime import native
from tests.cases.linear import Case

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
WAYS = [pytest.param("cpu", marks=pytest.mark.skipif(native.why_not() is not None, reason="no _C"))]
WAYS += [pytest.param("torch"), pytest.param("reference")]


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_oracle(backend: str, dtype: torch.dtype) -> None:
    """Widths below, at and above a panel, a part of a row's dropout bits and a piece of columns."""
    for activation in (None, *ACTIVATIONS):
        for gated in (False, True) if activation else (False,):
            for rows, width_in, width_out, extra in (
                ((5,), 7, 16, {}), ((2, 50), 300, 65, {"dropout_p": 0.3}),
                ((97,), 130, 530, {"residual": True, "dropout_p": 0.5}),
                ((4, 3, 2), 20, 33, {"residual": True, "strides": "every other"}),
                ((7, 6), 260, 31, {"residual": True, "strides": "permuted", "bias": False}),
            ):  # fmt: skip
                more: dict[str, Any] = {"activation": activation, "gated": gated, **extra}
                case = Case(rows, width_in, width_out, dtype, **more)
                if backend != "torch" or not case.dropout_p:
                    case.check(backend)


@pytest.mark.parametrize("backend", [WAYS[0], WAYS[2]])
def test_the_dropout_is_that_of_bias_activation(backend: str) -> None:
    """One pair of seed and offset gives one mask, wherever a block of the kernel begins."""
    rng = torch.tensor([2**40 + 3, 2**33 + 1])
    x, weight = torch.ones(200, 3), torch.ones(1100, 3)
    y = fused_attn.linear(
        x, weight, activation="relu", dropout_p=0.25, dropout_rng=rng, backend=backend
    )
    h = torch.full((200, 1100), 3.0)
    expected = fused_attn.bias_activation(h, activation="relu", dropout_p=0.25, dropout_rng=rng)
    torch.testing.assert_close(y, expected)


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_one_rounding() -> None:
    """The kernel's result is the float32 result, rounded; torch rounds the product first."""
    torch.manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(s).bfloat16() for s in ((40, 64), (160, 64), (160,), (40, 80))
    )
    how: dict[str, Any] = {"activation": "silu", "gated": True, "residual": residual}
    exact = fused_attn.linear(
        x.double(), weight.double(), bias.double(), activation="silu", gated=True,
        residual=residual.double(), backend="reference",
    )  # fmt: skip

    def error(backend: str) -> float:
        y = fused_attn.linear(x, weight, bias, **how, backend=backend)
        return float((y.double() - exact).norm() / (exact.bfloat16().double() - exact).norm())

    assert error("cpu") < 1.02
    assert error("torch") > 1.2


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_who_runs_it() -> None:
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    assert fused_attn.explain(fused_attn.linear, x, weight, activation="gelu").chosen == "torch"
    told = fused_attn.explain(fused_attn.linear, x, weight, dropout_p=0.5)
    assert told.chosen == "cpu"
    assert "has no kernels for `dropout_rng`" in str(told)
    x, weight = x.double(), weight.double()
    told = fused_attn.explain(fused_attn.linear, x, weight, dropout_p=0.5)
    assert told.chosen == "reference"


@pytest.mark.parametrize("backend", [WAYS[0], WAYS[2]])
def test_gradients_of_every_operand(backend: str) -> None:
    """Of the residual as well, and to the second order."""
    shapes = {"x": (3, 4), "weight": (5, 4), "bias": (5,), "residual": (3, 5)}
    tensors = {name: torch.randn(s, requires_grad=True) for name, s in shapes.items()}
    how: dict[str, Any] = {"dropout_p": 0.4, "dropout_rng": torch.tensor([1, 2])}
    how["activation"] = "gelu"

    def second(backend: str) -> tuple[Tensor, ...]:
        y = fused_attn.linear(**tensors, **how, backend=backend)
        wanted = list(tensors.values())
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    for a, b in zip(second(backend), second("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "activation": ({"activation": "swish"}, ValueError, "`activation` must be one of 'relu'"),
    "no activation": ({"gated": True}, ValueError, "`gated` needs an `activation`"),
    "gated": ({"activation": "relu", "gated": 1}, TypeError, "`gated` must be a bool"),
    "odd": (
        {"activation": "relu", "gated": True},
        RuntimeError,
        "`weight` must have twice as many rows as y is wide, got 5",
    ),
    "residual": (
        {"residual": torch.randn(3, 4)},
        RuntimeError,
        r"`residual` must have y's shape \(3, 5\), got \(3, 4\)",
    ),
    "dtype": ({"residual": torch.randn(3, 5).double()}, RuntimeError, "`residual` must be"),
    "probability": ({"dropout_p": 1.5}, ValueError, "`dropout_p`"),
    "rng": ({"dropout_p": 0.5, "dropout_rng": torch.zeros(2)}, TypeError, "`dropout_rng`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_by_name(name: str) -> None:
    change, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        fused_attn.linear(torch.randn(3, 6), torch.randn(5, 6), **change)


def test_autocast_and_one_output() -> None:
    x, weight = torch.randn(8, 16), torch.randn(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_attn.linear(x, weight, activation="relu", residual=torch.ones(8))
    assert (y.shape, y.dtype) == ((8,), torch.bfloat16)
    torch.testing.assert_close(y.float(), (x @ weight).relu() + 1, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("backend", WAYS)
def test_it_compiles(backend: str) -> None:
    torch._dynamo.reset()
    weight, residual = torch.randn(6, 5), torch.randn(4, 6)

    def run(x: Tensor) -> Tensor:
        return fused_attn.linear(
            x, weight, activation="gelu", residual=residual, backend=backend
        ).sin()

    x = torch.randn(4, 5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
