"""Scores of any finite size give the right output, lse, weights and gradients.

All operands are small integers times powers of two, so that every score is exact in float32,
whatever the order of its sum: what is compared is the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import attention, attention_varlen, merge_attention
from fused_attn.runtime.triton import device as triton_device

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# Rows of a decoding step, of one block, of more than one; keys of one tile and of several.
SHAPES = ((3, 5), (40, 130), (70, 300))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


@pytest.fixture
def backend(attention_backend: str) -> str:
    if attention_backend == "triton" and triton_device.interpreted():
        pytest.skip("takes long in the interpreter: tests/triton/test_extreme_values.py")
    return attention_backend


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape).double()


def offset_scores(exponent: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Scores of about 2^exponent, some negative, that differ by multiples of 1/8 within a row."""
    q, k = integers(-2, 2, 1, 2, seqlen_q, 8), integers(-8, 8, 1, 2, seqlen_k, 8) / 8
    q[..., 0] = 2.0 ** (exponent // 2) * (1 - 2 * (torch.arange(seqlen_q) % 3 == 2).double())
    k[..., 0] = 2.0 ** (exponent - exponent // 2)
    return q, k


def far_scores(exponent: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Scores of -2^exponent, 0 and 2^exponent: weights of one over the number of the largest."""
    q, k = torch.zeros(1, 2, seqlen_q, 8).double(), torch.zeros(1, 2, seqlen_k, 8).double()
    q[..., 0] = 2.0 ** (exponent // 2) * integers(-1, 1, 1, 2, seqlen_q)
    k[..., 0] = 2.0 ** (exponent - exponent // 2) * integers(-1, 1, 1, 2, seqlen_k)
    return q, k


SCORES: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "offset by 2^9": lambda lq, lk: offset_scores(9, lq, lk),
    "offset by 2^13": lambda lq, lk: offset_scores(13, lq, lk),
    "offset by 2^17": lambda lq, lk: offset_scores(17, lq, lk),
    "offset by 2^20": lambda lq, lk: offset_scores(20, lq, lk),
    "2^20 apart": lambda lq, lk: far_scores(20, lq, lk),
    "2^34 apart": lambda lq, lk: far_scores(34, lq, lk),
    "2^100 apart": lambda lq, lk: far_scores(100, lq, lk),
    "2^126 apart": lambda lq, lk: far_scores(126, lq, lk),
}
each_score = pytest.mark.parametrize("scores", SCORES)


# Backward passes recompute probabilities from lse: they are off by half a unit of its last place,
# which counts up to an lse of 512 in the CPU's kernels.
LSE_ROUNDING = 256.0


def operands(scores: str, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    q, k = SCORES[scores](*shape)
    if not torch.isfinite(q.to(dtype)).all() or not torch.isfinite(k.to(dtype)).all():
        pytest.skip(f"{dtype} has no numbers of that size")
    v = integers(-4, 4, 1, 2, shape[1], 4)
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v))


def check(
    name: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    size: float | Tensor,
    more: float = 0.0,
) -> None:
    """Within a few roundings of numbers of this size (one, or by column), and `more`."""
    assert actual.isfinite().all(), f"{name} is not finite"
    error = (actual.double() - expected).abs()
    budget = (4 if dtype.itemsize == 2 else 64 + more) * torch.finfo(dtype).eps * size
    assert (error <= budget).all(), f"{name}: off by {(error / size).max():.3g} of its size"


def columns(x: Tensor) -> Tensor:
    """The size of each column."""
    return x.detach().double().abs().amax((0, 1, 2))


def check_call(given: tuple[Tensor, ...], backend: str, **options: Any) -> None:
    """Output, lse and gradients against the formula in float64."""
    dtype = given[0].dtype
    exact = [x.detach().double().requires_grad_() for x in given]
    extras = {
        name: x.detach().double().requires_grad_(x.requires_grad)
        for name, x in options.items()
        if isinstance(x, Tensor) and x.is_floating_point() and name == "bias"
    }
    out, lse = attention(*given, return_lse=True, backend=backend, **options)
    exact_options = {**options, **extras}
    want, want_lse = attention(*exact, return_lse=True, backend="reference", **exact_options)
    check("out", out, want, dtype, 4.0)
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    largest = max(1.0, want_lse[seen].abs().max().item())
    check("lse", lse[seen], want_lse[seen], precise, largest / 16 + 1)

    dout = integers(-2, 2, *out.shape)
    out.backward(dout.to(dtype))
    want.backward(dout)
    check_gradients(given, exact, options.get("scale", 1.0), dout)
    bias = options.get("bias")
    if bias is not None and bias.requires_grad:
        want_bias = exact_options["bias"].grad
        size = max(1.0, want_bias.abs().max().item())
        check(
            "dbias", bias.grad, want_bias, max(dtype, torch.float32, key=eps_of), size, LSE_ROUNDING
        )


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def check_gradients(
    given: tuple[Tensor, ...], exact: list[Tensor], scale: float, dresult: Tensor
) -> None:
    """Of q, k and v. Sums that come out as 0 are as exact as what they are made of."""
    q, k, v = given
    unit = abs(scale) * 4.0
    for name, x, precise, parts in (
        ("dq", q, exact[0], columns(k) * unit),
        ("dk", k, exact[1], columns(q) * unit),
        ("dv", v, exact[2], torch.ones(v.shape[3]).double() * dresult.abs().max()),
    ):
        assert x.grad is not None
        assert precise.grad is not None
        size = torch.maximum(columns(precise.grad), parts)
        check(name, x.grad, precise.grad, x.dtype, size, more=LSE_ROUNDING)


def test_one_score_of_1e10(backend: str) -> None:
    q, k = torch.tensor([[[[1e5]]]]), torch.tensor([[[[1e5], [0.0]]]])
    v = torch.tensor([[[[1.0], [2.0]]]])
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert out.item() == 1.0
    torch.testing.assert_close(lse.item(), 1e10, rtol=1e-7, atol=0.0)
    out.sum().backward()
    assert v.grad is not None
    assert v.grad.flatten().tolist() == [1.0, 0.0]
    assert q.grad is not None
    assert q.grad.item() == 0.0


@each_dtype
@each_shape
@each_score
def test_plain(scores: str, shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    check_call(operands(scores, dtype, shape), backend, scale=0.5)


@each_dtype
@each_score
@pytest.mark.parametrize("causal", ["upper_left", "lower_right"])
def test_causal(scores: str, causal: str, dtype: torch.dtype, backend: str) -> None:
    check_call(operands(scores, dtype, (70, 150)), backend, scale=0.5, causal=causal)


@each_dtype
@each_score
def test_masked(scores: str, dtype: torch.dtype, backend: str) -> None:
    mask = torch.rand(1, 2, 40, 130) < 0.5
    mask[0, 0, 3] = False
    check_call(operands(scores, dtype, (40, 130)), backend, scale=0.5, mask=mask)


@each_dtype
@each_score
@pytest.mark.parametrize("scale", [4.0, 2.0**-12, -0.5])
def test_other_scales(scores: str, scale: float, dtype: torch.dtype, backend: str) -> None:
    if scale > 1 and "126" in scores:
        pytest.skip("those scores are infinite")
    check_call(operands(scores, dtype, (40, 130)), backend, scale=scale)


@each_dtype
@pytest.mark.parametrize("size", [2.0**17, 2.0**40, 2.0**100, -(2.0**17), -(2.0**100)])
def test_bias(size: float, dtype: torch.dtype, backend: str) -> None:
    """Half of the keys have the same huge bias: they share the weight, or the others do."""
    bias = torch.where(torch.rand(1, 2, 40, 130) < 0.5, size, 0.0)
    bias[0, 1, 5] = size
    q, k, v = (x.detach() for x in operands("offset by 2^13", dtype, (40, 130)))
    k[..., 0] = 0.0  # scores of about 1, or, where the sum would be rounded, 0
    if abs(size) > 2.0**20:
        k.zero_()
    given = tuple(x.requires_grad_() for x in (q, k, v))
    check_call(given, backend, scale=1.0, bias=bias.requires_grad_())


@each_dtype
def test_the_lowest_bias_hides_nothing(dtype: torch.dtype, backend: str) -> None:
    """As in torch: a row of the lowest number everywhere averages all values."""
    q, k, v = (torch.zeros(1, 1, n, 8, dtype=dtype) for n in (3, 5, 5))
    v += torch.arange(5)[:, None]
    bias = torch.full((1, 1, 3, 5), torch.finfo(torch.float32).min)
    bias[0, 0, 1, 2] = bias[0, 0, 2, 4] = -1e30
    out, lse = attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    assert out[0, 0, :, 0].tolist() == [2.0, 2.0, 4.0]
    assert lse.isfinite().all()
    torch.testing.assert_close(lse[0, 0, 1:], torch.full_like(lse[0, 0, 1:], -1e30))


@each_dtype
@each_score
def test_softcap(scores: str, dtype: torch.dtype, backend: str) -> None:
    q, k, v = operands(scores, dtype, (40, 130))
    out, lse = attention(q, k, v, softcap=8.0, return_lse=True, backend=backend)
    exact = [x.detach().double() for x in (q, k, v)]
    want, want_lse = attention(*exact, softcap=8.0, return_lse=True, backend="reference")
    check("out", out, want, dtype, 4.0)
    check("lse", lse, want_lse, torch.float32, 8.0)
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()


@each_dtype
@pytest.mark.parametrize("slope", [2.0**16, 2.0**60])
def test_alibi(slope: float, dtype: torch.dtype, backend: str) -> None:
    given = operands("offset by 2^13", dtype, (40, 40))
    slopes = torch.tensor([slope, -slope])
    check_call(given, backend, scale=2.0**-13, alibi_slopes=slopes)


@each_dtype
@each_score
@pytest.mark.parametrize("seqlen_q", [3, 40])
def test_weights(scores: str, seqlen_q: int, dtype: torch.dtype, backend: str) -> None:
    q, k, v = operands(scores, dtype, (seqlen_q, 300))
    options: dict[str, Any] = {"scale": 0.5, "return_weights": "average"}
    reasons = dict(fused_attn.explain(q, k, v, **options).reasons)[backend]
    if reasons:
        pytest.skip("; ".join(reasons))
    out, weights = attention(q, k, v, backend=backend, **options)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_weights = attention(*exact, backend="reference", **options)
    check("out", out, want, dtype, 4.0)
    check("weights", weights, want_weights, dtype, 1.0)
    dweights = integers(-2, 2, *weights.shape)
    weights.backward(dweights.to(dtype), retain_graph=True)
    want_weights.backward(dweights, retain_graph=True)
    (out.sum() * 0.0).backward()  # v takes no part in the weights
    (want.sum() * 0.0).backward()
    check_gradients((q, k, v), exact, 0.5, dweights)


@each_dtype
@each_score
def test_packed(scores: str, dtype: torch.dtype, backend: str) -> None:
    """A sequence of a decoding step and one of many queries, in one batch."""
    dense = [x.detach()[0] for x in operands(scores, dtype, (43, 143))]
    q, k, v = (x.transpose(0, 1) for x in dense)
    starts = [torch.tensor(x, dtype=torch.int32) for x in ((0, 3, 43), (0, 5, 143))]
    out, lse = attention_varlen(
        q, k, v, *starts, 40, 138, scale=0.5, return_lse=True, backend=backend
    )
    for rows, keys in ((slice(3), slice(5)), (slice(3, 43), slice(5, 143))):
        part = dense[0][:, rows], dense[1][:, keys], dense[2][:, keys]
        want, want_lse = attention(
            *(x.double()[None] for x in part), scale=0.5, return_lse=True, backend="reference"
        )
        check("out", out[rows].transpose(0, 1), want[0], dtype, 4.0)
        size = want_lse.abs().max().item() / 16 + 1
        check("lse", lse[:, rows], want_lse[0], torch.float32, size)


@each_score
def test_halves_merge(scores: str) -> None:
    """Keys may be split and the halves merged, as far as a float32 lse tells them apart."""
    q, k, v = (x.detach() for x in operands(scores, torch.float32, (3, 130)))
    halves = [
        attention(q, k[:, :, half], v[:, :, half], scale=0.5, return_lse=True)
        for half in (slice(65), slice(65, None))
    ]
    out, lse = merge_attention(*halves[0], *halves[1])
    lowest = torch.minimum(halves[0][0], halves[1][0])
    highest = torch.maximum(halves[0][0], halves[1][0])
    assert ((out >= lowest - 1e-5) & (out <= highest + 1e-5)).all()
    assert (lse >= torch.maximum(halves[0][1], halves[1][1])).all()
