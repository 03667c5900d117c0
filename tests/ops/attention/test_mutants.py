"""What planted mistakes once survived: each test is of the kind that would have caught one.

Gradients of packed sequences with dropout, how results are rounded, gradients that are NaN where
no query looks, and memory of the kernels that a call before has left full of NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import attention, attention_varlen
from fused_attn.runtime.triton import device as triton_device

LENGTHS_Q, LENGTHS_K = (37, 0, 5, 60), (21, 4, 0, 70)
each_16_bits = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": "lower_right"},
    "window": {"window": (9, 4)},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_gradients_of_packed_sequences_with_dropout(
    name: str, deterministic: bool, attention_backend: str
) -> None:
    rng = torch.tensor([1234, 5])
    total_q, total_k = sum(LENGTHS_Q), sum(LENGTHS_K)
    shapes = (total_q + 3, 4, 16), (total_k + 2, 2, 16), (total_k + 2, 2, 16)
    ours = operands(torch.float32, *shapes)
    exact = [x.detach().double().requires_grad_() for x in ours]
    dout = torch.randn(shapes[0])
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        found = []
        for given, backend in ((ours, attention_backend), (exact, "reference")):
            out = attention_varlen(
                *given, starts(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K),
                dropout_p=0.4, dropout_rng=rng, backend=backend, **PACKED[name],
            )  # fmt: skip
            out.backward(dout.to(out.dtype))
            found.append([out.detach(), *(x.grad for x in given)])
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, true, what in zip(*found, ("out", "dq", "dk", "dv"), strict=True):
        assert mine is not None
        assert true is not None
        assert true.abs().max() > 0.1
        error = (mine.double() - true).abs().max() / true.abs().max()
        assert error < 2e-5, f"{what}: off by {error:.2g} of its largest"


@each_16_bits
def test_results_are_rounded_to_the_nearest(dtype: torch.dtype, attention_backend: str) -> None:
    """Truncated ones would lie below the true ones (in size) by half a step on average."""
    small = attention_backend == "triton" and triton_device.interpreted()
    length = 32 if small else 96
    q, k, v = operands(dtype, *[(1, 4, length, 32)] * 3)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, backend=attention_backend)
    true = attention(*exact, backend="reference")
    results = {"out": (out.detach(), true.detach())}
    dout = torch.randn_like(out)
    out.backward(dout)
    true.backward(dout.double())
    for name, x, precise in zip("qkv", (q, k, v), exact, strict=True):
        assert x.grad is not None
        assert precise.grad is not None
        results[f"d{name}"] = x.grad, precise.grad
    for name, (mine, right) in results.items():
        step = torch.finfo(dtype).eps * torch.exp2(right.abs().log2().floor())
        # The error in steps, counted outwards: uniform in +-1/2 if rounded, about -1/2 if cut.
        error = ((mine.double() - right) * right.sign() / step).clamp(-2, 2)
        deviation = error.std() / error.numel() ** 0.5
        assert abs(float(error.mean())) < 0.05 + 5 * float(deviation), f"{name}: {error.mean():.3f}"


def hiding(length: int, blind: int) -> dict[str, dict[str, Any]]:
    """Ways to hide all keys from query `blind` (and, with lengths, from its batch element)."""
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[blind] = False
    bias = torch.zeros(length, length)
    bias[blind] = -torch.inf
    return {
        "mask": {"mask": mask},
        "bias": {"bias": bias},
        "lengths": {"key_lengths": torch.tensor([length, 0])},
        "causal": {"causal": "lower_right", "fewer": 3},
    }


@pytest.mark.parametrize("how", ["mask", "bias", "lengths", "causal"])
def test_nan_in_dout_of_a_row_that_sees_no_key(how: str, attention_backend: str) -> None:
    """It reaches nothing: that row's output is a constant."""
    length, blind = 20, 1
    options = hiding(length, blind)[how]
    fewer = options.pop("fewer", 0)
    keys = (2, 2, length - fewer, 8)
    q, k, v = operands(torch.float32, (2, 2, length, 8), keys, keys)
    dout = torch.randn(2, 2, length, 8)
    rows = (1,) if how == "lengths" else (slice(None), slice(None), blind)
    clean = dout.clone()
    clean[rows] = 0.0
    dout[rows] = torch.nan
    found = []
    for grad in (dout, clean):
        out = attention(q, k, v, backend=attention_backend, **options)
        found.append(torch.autograd.grad(out, (q, k, v), grad))
    for with_nan, without in zip(*found, strict=True):
        assert torch.equal(with_nan, without)


@pytest.mark.parametrize("seqlen_q", [1, 5, 33])
def test_a_call_leaves_nothing_in_the_kernels_memory(seqlen_q: int, attention_backend: str) -> None:
    """First a call whose every number is NaN, then one that must not hear of it."""
    if attention_backend == "triton" and triton_device.interpreted():
        pytest.skip(
            "its kernels have no memory but torch's, which every test poisons; minutes long"
        )
    shapes = (2, 4, seqlen_q, 16), (2, 2, 70, 16), (2, 2, 70, 24)

    def call(given: list[Tensor]) -> list[Tensor]:
        bias = torch.full((seqlen_q, 70), 0.5 if given[0].isfinite().all() else torch.nan)
        bias.requires_grad_()
        results = [
            attention(*given, backend=attention_backend),
            attention(*given, backend=attention_backend, bias=bias, causal="lower_right"),
            attention(*given, backend=attention_backend, key_lengths=torch.tensor([70, 33])),
        ]
        total = sum(x.sum() for x in results)
        assert isinstance(total, Tensor)
        return [*results, *torch.autograd.grad(total, [*given, bias])]

    given = operands(torch.float32, *shapes)
    expected = call(given)
    call([torch.full(shape, torch.nan, requires_grad=True) for shape in shapes])
    for before, after in zip(expected, call(given), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_bias_of_a_third_dtype_under_autocast(bias: torch.dtype, autocast: torch.dtype) -> None:
    """q, k and v take autocast's dtype; the bias is added in float32, whatever it is."""
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    given = torch.randn(2, 9, 9).to(bias).requires_grad_()
    with torch.autocast("cpu", autocast):
        out = attention(q, k, v, bias=given)
    assert out.dtype == autocast
    rounded = [x.to(autocast).double() for x in (q, k, v)]
    true = attention(*rounded, bias=given.double())
    assert (out.double() - true).abs().max() < 4 * torch.finfo(autocast).eps
    [gradient] = torch.autograd.grad(out.float().sin().sum(), given)
    [right] = torch.autograd.grad(true.sin().sum(), given)
    assert gradient.dtype == bias
    assert (gradient.double() - right.double()).abs().max() < 16 * torch.finfo(autocast).eps
