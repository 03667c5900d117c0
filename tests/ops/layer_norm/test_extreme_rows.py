"""Finite rows of any size are normalised rightly, forward and backward: no statistic overflows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_attn import layer_norm, rms_norm
from fused_attn.ops.layer_norm import torch_functions
from fused_attn.runtime.triton import device as triton_device

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

Norm = Callable[..., Tensor]
each_norm = pytest.mark.parametrize("norm", [layer_norm, rms_norm])

# Widths that a GPU holds in a warp, in a block, and reads again; odd ones, and one of a few lanes.
each_width = pytest.mark.parametrize("width", [4, 33, 256, 2048, 5000])

SIZES = (2.0**60, 2.0**100, 2.0**126, 2.0**-60, 2.0**-100, 2.0**-120, 65504.0, 2.0**-14)
each_size = pytest.mark.parametrize("size", SIZES)


@pytest.fixture
def backend(layer_norm_backend: str) -> str:
    if layer_norm_backend == "triton" and triton_device.interpreted():
        pytest.skip("takes long in the interpreter: tests/triton/test_extreme_values.py")
    if layer_norm_backend == torch_functions.NAME:
        pytest.skip("torch's answer is torch's: test_torch_functions.py")
    return layer_norm_backend


def rows_of(size: float, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of about that size beside one of about 1."""
    x = torch.randn(5, width).clamp(-1.9, 1.9).double()
    x = (x * torch.tensor([size, 1.0, -size, size / 2, size])[:, None]).to(dtype)
    if not x.isfinite().all() or (x[0] == 0.0).all():
        pytest.skip(f"{dtype} has no numbers of that size")
    return x


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all(), f"{name} is not finite"
    dtype = actual.dtype
    tolerance = (4 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
    size = expected.abs().amax(-1, keepdim=True)
    # Gradients of rows near the end of the range may be subnormal.
    budget = tolerance * size + 2 * torch.finfo(dtype).tiny
    error = (actual.double() - expected).abs()
    assert (error <= budget).all(), f"{name}: off by {(error / size).max():.3g} of its size"


def test_by_hand(backend: str) -> None:
    x = torch.tensor([[1e20, 2e20, 3e20, -1e20]])
    y = layer_norm(x, (4,), backend=backend)
    expected = torch.tensor([[-0.169031, 0.507093, 1.183216, -1.521278]])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y = rms_norm(x, (4,), backend=backend)
    expected = torch.tensor([[0.516398, 1.032796, 1.549193, -0.516398]])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@each_dtype
@each_width
@each_size
@each_norm
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_rows_of_any_size(
    norm: Norm, size: float, width: int, eps: float, dtype: torch.dtype, backend: str
) -> None:
    if eps == 0.0 and size < torch.finfo(dtype).tiny * 2.0**12:
        pytest.skip("1 / size, or its gradient, is no number of that type")
    x = rows_of(size, width, dtype).requires_grad_()
    weight = torch.randn(width).to(dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    y = norm(x, (width,), weight, eps=eps, backend=backend)
    want = norm(exact[0], (width,), exact[1], eps=eps, backend="reference")
    check("y", y, want)

    dy = torch.randn(5, width).to(dtype)
    y.backward(dy)
    want.backward(dy.double())
    for name, given, precise in zip(("dx", "dweight"), (x, weight), exact, strict=True):
        assert given.grad is not None
        assert precise.grad is not None
        if name == "dx" and precise.grad.abs().max() > torch.finfo(dtype).max:
            continue
        check(name, given.grad, precise.grad)


@each_norm
@pytest.mark.parametrize("size", [2.0**126, 1.0, 2.0**-100, 2.0**-120])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1e-30, 1e-38, 0.0])
def test_eps_keeps_its_meaning(norm: Norm, size: float, eps: float, backend: str) -> None:
    x = rows_of(size, 64, torch.float32)
    y = norm(x, (64,), eps=eps, backend=backend)
    z = x.double()
    if norm is layer_norm:
        z = z - z.mean(-1, keepdim=True)
    check("y", y, z / torch.sqrt((z * z).mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1.0])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 33, 256, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_equal_numbers(width: int, eps: float, dtype: torch.dtype, backend: str) -> None:
    """y = 0 and dx = (dy - its mean) / sqrt(eps), however large the numbers are."""
    top = torch.finfo(dtype).max
    sizes = torch.tensor([top, -top, top / 2, top / 3, top / 5, top / 300], dtype=torch.float64)
    x = sizes[:, None].repeat(1, width).to(dtype).requires_grad_()
    y = layer_norm(x, (width,), eps=eps, backend=backend)
    assert torch.equal(y, torch.zeros_like(y))
    dy = torch.randn(len(sizes), width).to(dtype)
    y.backward(dy)
    g = dy.double()
    # Widths of one and a few: what is left of dy may be nothing but rounding.
    error = x.grad.double() - (g - g.mean(-1, keepdim=True)) / eps**0.5
    assert (error.abs() <= 8 * torch.finfo(dtype).eps * g.abs().amax() / eps**0.5).all()


def test_equal_rows_stay_equal(backend: str) -> None:
    """A row times a power of two gives the same bits: nothing is rounded on the way."""
    x = torch.randn(1, 256)
    y = [layer_norm(x * size, (256,), eps=0.0, backend=backend) for size in (1.0, 2.0**100)]
    torch.testing.assert_close(y[1], y[0], rtol=1e-6, atol=1e-6)


@each_norm
def test_zero_and_infinite_rows_are_as_they_were(norm: Norm, backend: str) -> None:
    x = torch.zeros(3, 16)
    x[1, 3] = torch.inf
    x[2] = torch.randn(16)
    y = norm(x, (16,), backend=backend)
    assert torch.equal(y[0], torch.zeros(16))
    assert y[1].isnan().any()
    check("y", y[2:], norm(x[2:].double(), (16,), backend="reference"))
