"""The linear operation, for every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.ops.linear import measured
from fused_attn.runtime import native, processor
from tests.cases.linear import Case, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no bias": {"bias": False},
    "columns": {"strides": "columns"},
    "every other": {"strides": "every other"},
    "permuted": {"strides": "permuted"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_oracle(linear_backend: str, dtype: torch.dtype, variant: str) -> None:
    for shape, width_in, width_out in (
        ((), 5, 3), ((1,), 1, 1), ((7,), 17, 33), ((2, 50), 64, 96), ((3, 5, 7), 300, 18),
        ((97,), 259, 530), ((5,), 2050, 7),
    ):  # fmt: skip
        Case(shape, width_in, width_out, dtype, **VARIANTS[variant]).check(linear_backend)


def test_fuzz(linear_backend: str, fuzz_seed: int) -> None:
    if linear_backend != "cpu" and fuzz_seed % 10:
        pytest.skip("torch's own products: every tenth case")
    random_case(fuzz_seed).check(linear_backend)


@needs_kernels
def test_a_weight_that_is_packed_in_several_parts() -> None:
    x, weight = torch.randn(3, 2050).bfloat16(), (torch.randn(4200, 2050) / 45).bfloat16()
    y = fused_attn.linear(x, weight, backend="cpu")
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        dx = torch.autograd.functional.vjp(
            lambda x: fused_attn.linear(x, weight, backend="cpu"), x, torch.ones_like(y)
        )[1]
    expected = weight.double().sum(0).expand_as(dx)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "width_in", "width_out"), [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty(
    linear_backend: str, rows: int, width_in: int, width_out: int, dtype: torch.dtype
) -> None:
    case = Case((rows,), width_in, width_out, dtype)
    tensors = case.tensors()
    [y], [expected] = case.run(linear_backend, **tensors), case.plain(**tensors)
    torch.testing.assert_close(y, expected)
    wanted = list(tensors.values())
    for a, b in zip(*(torch.autograd.grad(t.sum(), wanted) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_torch(dtype: torch.dtype) -> None:
    """Over random layers: the error of y and of every gradient against float64, on average."""
    ours, theirs = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        tensors = Case((4, 40), 300 + 20 * seed, 130, dtype).tensors()
        dy = torch.randn(4, 40, 130).to(dtype)
        exact = _results(tensors, dy, torch.float64, "torch")
        for errors, backend in ((ours, "cpu"), (theirs, "torch")):
            found = _results(tensors, dy, dtype, backend)
            errors.append([float((a - b).norm()) for a, b in zip(found, exact, strict=True)])
    for mine, other in zip(torch.tensor(ours).T, torch.tensor(theirs).T, strict=True):
        assert mine.mean() <= other.mean() * 1.02


def _results(
    tensors: dict[str, Tensor], dy: Tensor, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    given = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    y = fused_attn.linear(**given, backend=backend)
    grads = torch.autograd.grad(y, list(given.values()), dy.to(dtype))
    return [x.detach().double() for x in (y, *grads)]


@needs_kernels
def test_results_do_not_depend_on_threads() -> None:
    case = Case((130,), 300, 700, torch.bfloat16)
    tensors = case.tensors()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        [y] = case.run("cpu", **tensors)
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))))
    torch.set_num_threads(before)
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            assert torch.equal(a, b)


def test_a_bias_gets_the_sum_over_many_rows(linear_backend: str) -> None:
    """Sums so deep are made of groups of parts."""
    x, weight, bias = torch.randn(1300, 3), torch.randn(20, 3), torch.randn(20, requires_grad=True)
    dy = torch.randn(1300, 20)
    out = fused_attn.linear(x, weight, bias, backend=linear_backend)
    [found] = torch.autograd.grad(out, bias, dy)
    torch.testing.assert_close(found.double(), dy.double().sum(0), rtol=1e-5, atol=1e-4)


def test_one_output_without_a_dimension(linear_backend: str) -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(5), torch.randn(())
    y = fused_attn.linear(x, weight, bias, backend=linear_backend)
    torch.testing.assert_close(y, F.linear(x, weight) + bias)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"x": torch.randn(3, 5)}, r"`x` must end in the weight's 6 columns, got \(3, 5\)"),
    "no dimension": ({"x": torch.randn(())}, "`x` must have at least 1 dimension"),
    "weight": ({"weight": torch.randn(2, 4, 6)}, r"`weight` must have shape \(out, in\)"),
    "bias": ({"bias": torch.randn(5)}, r"`bias` must have shape \(out,\) = \(4,\), got \(5,\)"),
    "dtype": ({"weight": torch.randn(4, 6).double()}, "`weight` must be torch.float32"),
    "device": ({"bias": torch.randn(4, device="meta")}, "`bias` must be on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_torchs_errors_by_name(name: str) -> None:
    change, words = WRONG[name]
    tensors = {"x": torch.randn(3, 6), "weight": torch.randn(4, 6), "bias": torch.randn(4)}
    tensors |= change
    with pytest.raises(RuntimeError, match=words):
        fused_attn.linear(**tensors)


def test_what_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="`x` must be a tensor"):
        fused_attn.linear([1.0], torch.randn(1, 1))
    with pytest.raises(TypeError, match="`weight` must be a tensor"):
        fused_attn.linear(torch.randn(1, 1), None)
    with pytest.raises(TypeError, match=r"`x` must be torch\.float32"):
        fused_attn.linear(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="unexpected argument `input`"):
        fused_attn.linear(torch.randn(1, 1), torch.randn(1, 1), input=1)


PROCESSORS = {
    "AVX2 alone": ("amd", (), {torch.bfloat16: "cpu", torch.float16: "cpu"}),
    "Zen 4": ("amd", ("avx512_bf16",), {torch.bfloat16: "torch", torch.float16: "cpu"}),
    "AMX": (
        "intel",
        ("avx512_bf16", "amx_tile", "amx_bf16", "avx512_fp16"),
        {torch.bfloat16: "torch", torch.float16: "torch"},
    ),
    "another": ("", (), {torch.bfloat16: "torch", torch.float16: "torch"}),
}


@needs_kernels
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_faster_product_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor, features, expected = PROCESSORS[name]
    monkeypatch.setattr(processor, "vendor", lambda: vendor)
    monkeypatch.setattr(processor, "has", lambda *wanted: bool(set(wanted) & set(features)))
    for dtype, chosen in {**expected, torch.float32: "torch", torch.float64: "torch"}.items():
        x, weight = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
        told = fused_attn.explain(fused_attn.linear, x, weight)
        assert told.chosen == chosen, str(told)
        small = fused_attn.explain(fused_attn.linear, x[:2], weight)
        assert small.chosen == "torch"
        assert chosen == "torch" or "too small to gain from ours" in str(small)


def test_autocast_converts_as_torch_does() -> None:
    x, weight, bias = torch.randn(8, 64), torch.randn(64, 64), torch.randn(64)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused_attn.linear(x, weight, bias), F.linear(x, weight, bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles(linear_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    weight, bias = torch.randn(6, 5, requires_grad=True), torch.randn(6)

    def run(x: Tensor) -> Tensor:
        return fused_attn.linear(x, weight, bias, backend=linear_backend).sin()

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 9):
        x = torch.randn(rows, 5, requires_grad=True)
        torch.testing.assert_close(compiled(x), run(x))
        grads = (torch.autograd.grad(f(x).sum(), (x, weight)) for f in (compiled, run))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_double_backward_is_right(linear_backend: str) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float32) for s in ((3, 4), (5, 4), (5,)))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]

    def second(backend: str) -> tuple[Tensor, ...]:
        y = fused_attn.linear(*tensors, backend=backend)
        first = torch.autograd.grad(y.sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for a, b in zip(second(linear_backend), second("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_measured_speaks_of_what_torch_runs() -> None:
    assert measured.is_never_ours(torch.randn(3))
    assert measured.is_never_ours(torch.randn(3, device="meta").bfloat16())
    assert not measured.is_never_ours(torch.randn(3).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not measured.is_never_ours(torch.randn(3))
