"""dropout(act(x + bias)) and its gated form, for every backend."""

from __future__ import annotations

import math

import pytest
import torch

from fused_attn import bias_activation
from fused_attn.ops.bias_activation import reference, torch_functions
from tests.cases.bias_activation import PLAIN, RNG, Case, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# One column; below, at and above one vector of 16; one vector of a mask and one lane.
SHAPES = [(5, 1), (3, 15), (2, 3, 16), (9, 65), (33, 100), (7,)]

VARIANTS = {
    "bias": {},
    "no bias": {"bias": False},
    "dropout": {"dropout_p": 0.3},
    "gated": {"gated": True},
    "gated dropout": {"gated": True, "dropout_p": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_oracle(
    bias_activation_backend: str, dtype: torch.dtype, activation: str, variant: str
) -> None:
    for shape in SHAPES:
        Case(activation, shape, dtype, **VARIANTS[variant]).check(bias_activation_backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_threads_share(bias_activation_backend: str, dtype: torch.dtype) -> None:
    Case(shape=(1203, 40), dtype=dtype).check(bias_activation_backend)
    Case(shape=(1203, 40), dtype=dtype, gated=True).check(bias_activation_backend)


@pytest.mark.parametrize("strides", ["every other", "transposed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(bias_activation_backend: str, variant: str, strides: str) -> None:
    case = Case(shape=(4, 3, 20), dtype=torch.bfloat16, strides=strides, **VARIANTS[variant])
    case.check(bias_activation_backend)
    assert case.run(bias_activation_backend, **case.tensors()).is_contiguous()


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_promote_as_an_addition_does(
    bias_activation_backend: str, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    case = Case(shape=(7, 50), dtype=dtype, bias_dtype=bias_dtype)
    case.check(bias_activation_backend)
    x, bias = case.tensors().values()
    y = case.run(bias_activation_backend, x, bias)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, bias.grad.dtype) == ((x + bias).dtype, dtype, bias_dtype)


def test_fuzz(bias_activation_backend: str, fuzz_seed: int) -> None:
    random_case(fuzz_seed).check(bias_activation_backend)


@pytest.mark.parametrize("activation", PLAIN)
def test_every_argument_within_two_float32_steps(
    bias_activation_backend: str, activation: str
) -> None:
    """Values and derivatives over the whole range, tails included; torch in float64 is the truth.

    A step is that of float32 at the larger of 1 and |x|: both are differences of such numbers.
    """
    if bias_activation_backend in (reference.NAME, torch_functions.NAME):
        pytest.skip("torch's own float32 is off by up to three steps, its derivative by nine")
    x = torch.cat([torch.linspace(-120, 120, 60_001), torch.linspace(-6, 6, 60_001)])
    x.requires_grad_()
    y = bias_activation(x, activation=activation, backend=bias_activation_backend)
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = PLAIN[activation](exact_x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    step = torch.finfo(torch.float32).eps * exact_x.detach().abs().clamp(min=1.0)
    assert float(((y.detach() - exact.detach()).abs() / step).max()) <= 2.0
    smooth = exact_x.detach() != 0
    error = (slope - exact_slope).abs() / torch.finfo(torch.float32).eps
    assert float(error[smooth].max()) <= 4.0


@pytest.mark.parametrize("activation", PLAIN)
def test_infinity_and_nan(bias_activation_backend: str, activation: str) -> None:
    if bias_activation_backend in (reference.NAME, "torch") and activation == "gelu":
        pytest.skip("torch's vectorised GELU of infinity is NaN")
    for dtype in DTYPES:
        x = torch.tensor([math.inf, math.nan, 1.0, 3e4], dtype=dtype)
        y = bias_activation(x, activation=activation, backend=bias_activation_backend)
        assert y[0] == math.inf
        assert bool(y[1].isnan())
        torch.testing.assert_close(y[2:], PLAIN[activation](x[2:]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0), (0, 0), (0,)])
def test_empty(bias_activation_backend: str, shape: tuple[int, ...], gated: bool) -> None:
    case = Case(shape=shape, gated=gated)
    x, bias = case.tensors().values()
    y = case.run(bias_activation_backend, x, bias)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    if 0 in shape[:-1]:
        assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("gated", [False, True])
def test_rows_do_not_touch_each_other(bias_activation_backend: str, gated: bool) -> None:
    case = Case(shape=(9, 70), gated=gated)
    tensors = case.tensors(requires_grad=False)
    expected = case.run(bias_activation_backend, **tensors)
    tensors["x"][4] = float("nan")
    y = case.run(bias_activation_backend, **tensors)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y[others], expected[others])
    assert bool(y[4].isnan().all())


def test_dropout_is_the_norms(bias_activation_backend: str) -> None:
    """One seed drops the same elements as the dropout of `add_layer_norm`, at any p."""
    from fused_attn import add_layer_norm

    rng = torch.tensor(RNG)
    for width in (1, 3, 64, 131):
        x = torch.ones(37, width)
        for p in (0.1, 0.9, 1.0):
            y = bias_activation(
                x, activation="relu", dropout_p=p, dropout_rng=rng, backend=bias_activation_backend
            )
            _, total = add_layer_norm(
                x, torch.zeros_like(x), width, dropout_p=p, dropout_rng=rng, return_sum=True
            )
            torch.testing.assert_close(y, total, rtol=1e-6, atol=0)


def test_dropout_keeps_the_right_share_and_follows_the_generator(
    bias_activation_backend: str,
) -> None:
    x = torch.ones(200, 1000)

    def draw() -> torch.Tensor:
        return bias_activation(
            x, activation="relu", gated=True, dropout_p=0.25, backend=bias_activation_backend
        )

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
    assert abs(float((first != 0).float().mean()) - 0.75) < 0.005
    torch.testing.assert_close(first[first != 0].unique(), torch.tensor([1 / 0.75]))


def test_dropped_values_do_not_matter(bias_activation_backend: str) -> None:
    x = torch.full((20, 30), float("inf"), requires_grad=True)
    y = bias_activation(x, activation="relu", dropout_p=1.0, backend=bias_activation_backend)
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("activation", PLAIN)
def test_outputs_in_place(bias_activation_backend: str, activation: str) -> None:
    for dtype in DTYPES:
        case = Case(activation, (40, 130), dtype)
        x, bias = case.tensors(requires_grad=False).values()
        expected = case.run(bias_activation_backend, x, bias)
        spread = torch.zeros(40, 260, dtype=dtype)[:, ::2]
        gated = torch.cat([x, x], dim=-1)
        expected_gated = bias_activation(
            gated, activation=activation, gated=True, backend=bias_activation_backend
        )
        for source, out, wanted, arguments in (
            (x.clone(), spread, expected, {"bias": bias}),
            (x, x, expected, {"bias": bias}),
            (gated, gated[:, :130], expected_gated, {"gated": True}),
        ):
            result = bias_activation(
                source,
                activation=activation,
                out=out,
                backend=bias_activation_backend,
                **arguments,
            )
            assert result is out
            assert torch.equal(out, wanted)


def test_large_outputs_are_complete(bias_activation_backend: str) -> None:
    """Beyond 8 MB the CPU kernels write past the caches."""
    for width, gated in ((1024, False), (1023, False), (1024, True), (1032, True)):
        case = Case(shape=(2300, width), gated=gated)
        tensors = case.tensors()
        y, expected = case.run(bias_activation_backend, **tensors), case.plain(**tensors)
        torch.testing.assert_close(y, expected)
        seed = torch.randn_like(y)
        grads, wanted = (
            torch.autograd.grad(result, list(tensors.values()), seed) for result in (y, expected)
        )
        torch.testing.assert_close(grads[0], wanted[0])
        torch.testing.assert_close(grads[1], wanted[1], rtol=1e-4, atol=1e-3)


def test_results_repeat_bit_by_bit(bias_activation_backend: str) -> None:
    case = Case(shape=(900, 77), dropout_p=0.1, gated=True)
    tensors = case.tensors()

    def results() -> tuple[torch.Tensor, ...]:
        y = case.run(bias_activation_backend, **tensors)
        return (y, *torch.autograd.grad(y.sin().sum(), list(tensors.values())))

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)


def test_explains_itself(bias_activation_backend: str) -> None:
    from fused_attn.ops.bias_activation import call
    from fused_attn.ops.bias_activation.problem import Operands

    x, bias = Case(gated=True).tensors().values()
    scalars = call.Scalars("silu", True, 0.1, bias_activation_backend)
    text = str(call.problem_of(Operands(x, bias), scalars))
    for part in ("shape=(5, 48)", "activation='silu'", "gated", "dropout_p=0.1", "with gradient"):
        assert part in text
