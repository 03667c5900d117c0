"""LayerNorm and RMSNorm, with residual and without, for every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attn import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fused_attn.runtime import native
from tests.cases.layer_norm import DTYPES, RNG, Case, random_case, served_dtypes

# One column; below, at and above one vector of 16; four vectors and one lane; the width at which
# sums go through a double.
SHAPES = [(5, 1), (3, 15), (2, 3, 16), (9, 65), (33, 100), (1, 9001)]

VARIANTS = {
    "norm": {},
    "post": {"residual": "post"},
    "pre": {"residual": "pre"},
    "post dropout": {"residual": "post", "dropout_p": 0.3},
    "pre dropout": {"residual": "pre", "dropout_p": 0.3},
}


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_oracle(
    layer_norm_backend: str, dtype: torch.dtype, variant: str, rms: bool
) -> None:
    for shape in SHAPES:
        Case(shape, dtype=dtype, rms=rms, **VARIANTS[variant]).check(layer_norm_backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_threads_share(layer_norm_backend: str, dtype: torch.dtype) -> None:
    Case((1203, 40), dtype=dtype, residual="pre").check(layer_norm_backend)


@pytest.mark.parametrize("strides", ["every other", "transposed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(layer_norm_backend: str, variant: str, strides: str) -> None:
    for shape, dims in (((4, 3, 20), 1), ((3, 4, 5, 6), 2)):
        case = Case(shape, dims, torch.bfloat16, strides=strides, **VARIANTS[variant])
        case.check(layer_norm_backend)
        outputs = case.run(layer_norm_backend, **case.tensors())
        assert all(output.is_contiguous() for output in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_dtypes(layer_norm_backend: str, variant: str, dtype: torch.dtype) -> None:
    case = Case((7, 50), dtype=dtype, weight_dtype=torch.float32, **VARIANTS[variant])
    case.check(layer_norm_backend)
    if case.residual is not None:
        replace(case, residual_dtype=torch.float32).check(layer_norm_backend)
        x = case.tensors(requires_grad=False)
        x["residual"] = x["residual"].float()
        assert case.run(layer_norm_backend, **x)[0].dtype == torch.float32


def test_rms_norm_takes_weights_of_any_dtype(layer_norm_backend: str) -> None:
    for dtype in served_dtypes(layer_norm_backend):
        for weight_dtype in DTYPES:
            case = Case((4, 33), dtype=dtype, weight_dtype=weight_dtype, rms=True)
            x, weight = case.tensors().values()
            y = rms_norm(x, 33, weight, backend=layer_norm_backend)
            y.sum().backward()
            assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, weight_dtype)
            expected = rms_norm(x.double(), 33, weight.double(), backend="reference")
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",)], ids=["none", "weight", "bias"])
def test_parameters_are_optional(layer_norm_backend: str, parameters: tuple[str, ...]) -> None:
    case = Case((6, 7, 21), 2, weight="weight" in parameters, bias="bias" in parameters)
    case.check(layer_norm_backend)
    replace(case, residual="pre").check(layer_norm_backend)


def test_fuzz(layer_norm_backend: str, fuzz_seed: int) -> None:
    random_case(fuzz_seed).check(layer_norm_backend)


def test_the_sum_changes_nothing_else(layer_norm_backend: str) -> None:
    """Y of a pre-norm call is y of a post-norm call, and the norm of the sum."""
    for dtype in served_dtypes(layer_norm_backend):
        case = Case((50, 300), dtype=dtype, residual="pre", dropout_p=0.2)
        tensors = case.tensors(requires_grad=False)
        y, total = case.run(layer_norm_backend, **tensors)
        [post] = replace(case, residual="post").run(layer_norm_backend, **tensors)
        assert torch.equal(y, post)
        weight, bias = tensors["weight"], tensors["bias"]
        assert torch.equal(y, layer_norm(total, 300, weight, bias, backend=layer_norm_backend))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0), (0, 0)])
def test_empty(layer_norm_backend: str, shape: tuple[int, ...]) -> None:
    row = shape[-1:]
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.randn(row, requires_grad=True)
    bias = torch.randn(row, requires_grad=True)
    y, total = add_layer_norm(
        x, residual, row, weight, bias, return_sum=True, backend=layer_norm_backend
    )
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert x.grad.shape == residual.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(row))
    assert torch.equal(bias.grad, torch.zeros(row))


def test_constant_rows_have_finite_gradients(layer_norm_backend: str) -> None:
    """The variance is 0, eps below what float16 can hold: statistics must not be in float16."""
    for dtype in served_dtypes(layer_norm_backend):
        x = torch.full((3, 40), 0.3, dtype=dtype, requires_grad=True)
        weight = torch.ones(40, dtype=dtype, requires_grad=True)
        y = layer_norm(x, 40, weight, None, 1e-9, backend=layer_norm_backend)
        y.sum().backward()
        assert float(y.detach().abs().max()) < 0.01
        assert bool(x.grad.isfinite().all())
        assert bool(weight.grad.isfinite().all())


def test_statistics_are_float32(layer_norm_backend: str) -> None:
    """In float16 the sum of these squares overflows; in bfloat16 the mean loses its last bits."""
    for dtype in (torch.float16, torch.bfloat16):
        for offset in (0.0, 300.0):
            x = (torch.randn(4, 4096) * 60 + offset).to(dtype)
            y = layer_norm(x, 4096, backend=layer_norm_backend)
            expected = layer_norm(x.double(), 4096, backend="reference")
            torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)


def test_a_large_mean_does_not_cancel_the_variance(layer_norm_backend: str) -> None:
    x = torch.randn(4, 2000) + 1e4
    y = layer_norm(x, 2000, backend=layer_norm_backend)
    expected = layer_norm(x.double(), 2000, backend="reference").float()
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-3)


def test_rows_do_not_touch_each_other(layer_norm_backend: str) -> None:
    x = torch.randn(9, 70)
    expected = layer_norm(x, 70, backend=layer_norm_backend)
    x[4] = float("nan")
    x[6, 3] = float("inf")
    y = layer_norm(x, 70, backend=layer_norm_backend)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(y[others], expected[others])
    assert bool(y[4].isnan().all())


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpu_rounds_sums_of_all_16_bit_numbers_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).short().view(dtype).reshape(64, 1024)
    smallest_normal = torch.finfo(dtype).tiny
    for residual in (x.flip(1), x.roll(37, 0), x * 0.37):
        _, h = add_layer_norm(x, residual, 1024, return_sum=True, backend="cpu")
        expected = x + residual
        if dtype == torch.bfloat16:  # AVX-512's own conversion takes what is smaller for zero
            expected[(expected.abs() < smallest_normal) & (h == 0)] = 0
        torch.testing.assert_close(h, expected, rtol=0, atol=0, equal_nan=True)


def test_a_nan_stays_one_whatever_its_bits(layer_norm_backend: str) -> None:
    bits = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7FBFFFFF, 0x7FFF8000]
    nan = torch.tensor([*bits, *(b - 2**31 for b in bits)], dtype=torch.int32).view(torch.float32)
    assert bool(nan.isnan().all())
    weight = torch.ones(100)
    weight[7::10] = nan
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype in served_dtypes(layer_norm_backend):
            y = layer_norm(torch.randn(3, 100).to(dtype), 100, weight, backend=layer_norm_backend)
            assert torch.equal(y.isnan(), weight.isnan().expand(3, 100))


def test_dropout_is_the_reference_s(layer_norm_backend: str) -> None:
    rng = torch.tensor(RNG)
    for width in (1, 3, 64, 131):
        x = torch.ones(37, width)
        for p in (0.1, 0.9, 1.0):
            totals = [
                add_layer_norm(
                    x, torch.zeros_like(x), width, dropout_p=p, dropout_rng=rng, return_sum=True,
                    backend=backend,
                )[1]
                for backend in (layer_norm_backend, "reference")
            ]  # fmt: skip
            torch.testing.assert_close(*totals, rtol=1e-6, atol=0)


def test_dropout_keeps_the_right_share_and_follows_the_generator(layer_norm_backend: str) -> None:
    x, zeros = torch.ones(200, 500), torch.zeros(200, 500)

    def draw() -> torch.Tensor:
        return add_rms_norm(
            x, zeros, 500, dropout_p=0.25, return_sum=True, backend=layer_norm_backend
        )[1]

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
    assert abs(float((first != 0).float().mean()) - 0.75) < 0.005
    torch.testing.assert_close(first[first != 0].unique(), torch.tensor([1 / 0.75]))


def test_dropped_values_do_not_matter(layer_norm_backend: str) -> None:
    x = torch.full((20, 30), float("inf"), requires_grad=True)
    residual = torch.randn(20, 30)
    y, total = add_layer_norm(
        x, residual, 30, dropout_p=1.0, return_sum=True, backend=layer_norm_backend
    )
    assert torch.equal(total, residual)
    y.sin().sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_outputs_in_place(layer_norm_backend: str) -> None:
    for dtype in served_dtypes(layer_norm_backend):
        case = Case((40, 130), dtype=dtype, residual="pre")
        tensors = case.tensors(requires_grad=False)
        y, total = case.run(layer_norm_backend, **tensors)
        x, residual, weight, bias = (tensor.clone() for tensor in tensors.values())
        # The sum into the residual, y over x.
        result = add_layer_norm(
            x, residual, 130, weight, bias, out=x, sum_out=residual, backend=layer_norm_backend
        )
        assert result is x
        assert torch.equal(x, y)
        assert torch.equal(residual, total)
        spread = torch.zeros(40, 260, dtype=dtype)[:, ::2]
        results = add_layer_norm(
            tensors["x"], tensors["residual"], 130, weight, bias, return_sum=True, out=spread,
            backend=layer_norm_backend,
        )  # fmt: skip
        assert results[0] is spread
        assert torch.equal(spread, y)


def test_large_outputs_are_complete(layer_norm_backend: str) -> None:
    """Beyond 8 MB the CPU kernels write past the caches."""
    for width in (1024, 1023):
        case = Case((2300, width), residual="pre", dtype=torch.float32)
        tensors = case.tensors()
        outputs = case.run(layer_norm_backend, **tensors)
        expected = case.plain(**tensors)
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        seed = torch.randn_like(outputs[0])
        grads, wanted_grads = (
            torch.autograd.grad(results, list(tensors.values()), (seed, seed))
            for results in (outputs, expected)
        )
        for actual, wanted in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3)


def test_results_repeat_bit_by_bit(layer_norm_backend: str) -> None:
    case = Case((900, 77), residual="pre", dropout_p=0.1)
    tensors = case.tensors()

    def results() -> tuple[torch.Tensor, ...]:
        outputs = case.run(layer_norm_backend, **tensors)
        loss = sum(output.sin().sum() for output in outputs)
        return (*outputs, *torch.autograd.grad(loss, list(tensors.values())))

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)
