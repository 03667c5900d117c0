"""Scores and rows of any finite size: finite, right results by the Triton kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import attention
from fused_attn.runtime.triton import device as triton_device

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def can_run() -> None:
    if reasons := triton_device.why_not(torch.device("cpu")):
        pytest.skip("; ".join(reasons))


def exactly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """out, lse, weights and gradients of attention in float64, from the definition."""
    given = [x for x in (q, k, v, bias) if x is not None]
    inputs = [x.detach().double().requires_grad_() for x in given]
    q, k, v, *rest = inputs
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * options.get("scale", q.shape[3] ** -0.5)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if (slopes := options.get("alibi_slopes")) is not None:
        row, col = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        distance = (row + k.shape[2] - q.shape[2] - col).abs()
        scores = scores - slopes.double()[:, None, None] * distance
    if rest:
        scores = scores + rest[0]
    if options.get("causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    weights = scores.softmax(-1)
    out, lse = weights @ v, scores.logsumexp(-1)
    dout = gradient_like(out)
    grads = torch.autograd.grad((out * dout).sum(), inputs)
    names = ("q", "k", "v", "bias")
    return {"out": out, "lse": lse, "weights": weights} | {
        f"d{name}": grad for name, grad in zip(names, grads, strict=False)
    }


def sizes_of_terms(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """What the rounding of each result goes with: the sum of the sizes of what is added up."""
    weights = exactly(q, k, v, bias, **options)["weights"].detach()
    q, k, v = (x.double().abs() for x in (q, k, v))
    scale = abs(options.get("scale", q.shape[3] ** -0.5))
    dout = gradient_like(q.new_empty(*q.shape[:3], v.shape[3])).abs()
    ds = weights * (dout @ v.mT + (dout * (weights @ v)).sum(-1, keepdim=True))
    terms = {
        "out": weights @ v,
        "weights": weights,
        "dq": scale * (ds @ k),
        "dv": weights.mT @ dout,
    }
    terms["dk"] = scale * (ds.mT @ q)
    if bias is not None:
        terms["dbias"] = ds.sum_to_size(bias.shape)
    return terms


def gradient_like(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-4, 5, out.shape, generator=generator).to(out.dtype)


def by_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    if bias is not None:
        inputs.append(bias.clone().requires_grad_())
        options["bias"] = inputs[3]
    out, lse = attention(*inputs[:3], backend="triton", return_lse=True, **options)
    weights = attention(*inputs[:3], backend="triton", return_weights="per_head", **options)[1]
    grads = torch.autograd.grad((out * gradient_like(out)).sum(), inputs)
    names = ("q", "k", "v", "bias")
    return {"out": out, "lse": lse, "weights": weights} | {
        f"d{name}": grad for name, grad in zip(names, grads, strict=False)
    }


def check(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    dtype: torch.dtype,
    terms: dict[str, Tensor] | None = None,
) -> None:
    """Within some roundings of the terms; where a key has all the weight, without any error."""
    step = torch.finfo(dtype).eps
    for name, x in expected.items():
        if name.startswith("d") and x.abs().max() > torch.finfo(dtype).max:
            continue  # no number of this dtype
        y = actual[name].double()
        assert y.isfinite().all(), f"{name} is not finite: {y}"
        if name == "lse":
            bound = 8 * torch.finfo(torch.float32).eps * x.abs().clamp_min(1.0)
        else:
            bound = 16 * step * (x.abs() if terms is None else terms[name])
        assert ((y - x).abs() <= bound + 1e-30).all(), f"{name}: {y} instead of {x}"
    if "dq" in expected and "weights" in expected:
        alone = expected["weights"].amax(-1) == 1.0
        assert not actual["dq"][alone].any()


def compare(*tensors: Tensor | None, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    expected, terms = exactly(*tensors, **options), sizes_of_terms(*tensors, **options)
    check(by_triton(*tensors, **options), expected, dtype, terms)


def attention_case(size: float, seed: int = 0, **shapes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of few bits times `size` in q: scores are exact in any order of summation."""
    batch, heads, len_q, len_k, dim = (
        shapes.get(name, default)
        for name, default in (("b", 1), ("h", 1), ("q", 33), ("k", 70), ("d", 8))
    )
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    q, k = integers(batch, heads, len_q, dim) * size, integers(batch, heads, len_k, dim)
    return q, k, integers(batch, heads, len_k, dim)


SIZES = [2.0**10, 2.0**20, 2.0**80, -(2.0**100)]


@pytest.mark.parametrize("key", [1e5, 1e15, 1e25, 3e33])
def test_one_key_far_above_another(key: float) -> None:
    q, k = torch.tensor([[[[1e5]]]]), torch.tensor([[[[key], [0.0]]]])
    v = torch.tensor([[[[1.0], [2.0]]]])
    for bias in (None, torch.zeros(1, 1, 1, 2)):
        results = by_triton(q, k, v, bias)
        assert results["out"].item() == 1.0
        assert results["lse"].item() == pytest.approx(1e5 * key, rel=1e-6)
        assert results["weights"].flatten().tolist() == [1.0, 0.0]
        assert results["dq"].item() == 0.0
        assert results["dk"].flatten().tolist() == [0.0, 0.0]
        expected = gradient_like(results["out"]).item()
        assert results["dv"].flatten().tolist() == [expected, 0.0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_any_size(size: float, dtype: torch.dtype) -> None:
    q, k, v = attention_case(size)
    scale = 1.0
    if dtype == torch.float16:  # its operands are at most 65504: the scale makes the scores huge
        q, scale = q / size, size
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for options in ({"scale": scale}, {"scale": scale, "causal": True}):
        compare(q, k, v, dtype=dtype, **options)


@pytest.mark.parametrize("size", [1e4, 1e10, 1e30])
def test_random_products(size: float) -> None:
    """Not exact: but far from each other, so that the largest key is seen alone."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=generator) for _ in range(3))
    q, k = q * size, k * 100.0
    expected = exactly(q, k, v)
    top = expected["weights"].topk(2, -1).values
    assert ((top[..., 0] > 0.999999) | (size == 1e4)).all(), "a close call: choose another seed"
    actual = by_triton(q, k, v)
    seen = top[..., 0] > 0.999999
    assert seen.sum() > 30
    torch.testing.assert_close(actual["out"][seen].double(), expected["out"][seen])
    torch.testing.assert_close(actual["lse"].double(), expected["lse"], rtol=1e-5, atol=0.0)
    for name in ("weights", "dq", "dk", "dv"):
        assert actual[name].isfinite().all(), name
    if size > 1e4:
        torch.testing.assert_close(actual["dv"].double(), expected["dv"])
        assert not actual["dq"].any()
        assert not actual["dk"].any()


BIASES = {
    "lowest": torch.tensor([torch.finfo(torch.float32).min, -1e30, 0.0, 5.0]),
    "all huge": torch.tensor([3e38, 1e38, -1e38, 3e38]),
    "all lowest": torch.tensor([torch.finfo(torch.float32).min] * 4),
    "close": torch.tensor([1e6, 1e6 + 1.0, 1e6 - 2.0, -1e6]),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("size", [1.0, 2.0**30])
def test_a_bias_of_any_size(name: str, size: float) -> None:
    q, k, v = attention_case(size, q=20, k=4)
    if name == "close" and size > 1.0:
        pytest.skip("the sum of the two is not exact")
    bias = BIASES[name].expand(1, 1, 20, 4).contiguous()
    with torch.no_grad():
        rounded = (q.double() @ k.double().mT / 4).float() + bias
    if rounded.isinf().any():
        pytest.skip("a score that is not finite")
    # What float32 makes of a score is part of the question: the rest has to be right.
    compare(torch.zeros_like(q), k, v, bias)


@pytest.mark.parametrize("slope", [1e3, 1e10, 1e30])
def test_alibi_of_any_size(slope: float) -> None:
    q, k, v = attention_case(1.0, h=2, q=20, k=40)
    options = {"alibi_slopes": torch.tensor([slope, -slope])}
    compare(q * 0.0, k, v, **options)


@pytest.mark.parametrize("cap", [1e-3, 1e6, 1e30])
@pytest.mark.parametrize("size", [1.0, 2.0**90])
def test_a_softcap_of_any_size(cap: float, size: float) -> None:
    q, k, v = attention_case(size, q=20, k=40, d=2)
    results = by_triton(q, k, v, softcap=cap)
    expected = exactly(q, k, v, softcap=cap)
    for name, x in results.items():
        assert x.isfinite().all(), name
    if cap * 1e-7 < 1.0 or size >= 2.0**90:  # else rounding of a capped score decides
        torch.testing.assert_close(results["lse"].double(), expected["lse"], rtol=1e-5, atol=1e-5)
    if cap < 1.0:
        check(results, expected, torch.float32, sizes_of_terms(q, k, v, softcap=cap))


def test_a_row_whose_first_tile_is_far_below() -> None:
    """The running maximum starts at -1e10 and ends at 0: the sum is that of the last tile."""
    q, v = torch.ones(1, 1, 40, 1), torch.arange(160.0).view(1, 1, 160, 1)
    k = torch.full((1, 1, 160, 1), -1e10)
    k[0, 0, 150] = 0.0
    compare(q, k, v, scale=1.0)


def test_scores_that_only_cancel_are_finite() -> None:
    """Products of 1e20 whose sum is small: another order of summation gives another score."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 32, generator=generator) for _ in range(3))
    q[..., 0], q[..., 17], k[..., 0], k[..., 17] = 1e10, -1e10, 1e10, 1e10
    for x in by_triton(q, k, v).values():
        assert x.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 2.0**33])
def test_decoding(size: float) -> None:
    q, k, v = attention_case(size, q=1, k=700)
    with torch.no_grad():
        out, lse = attention(q, k, v, backend="triton", return_lse=True)
    expected = exactly(q, k, v)
    check({"out": out, "lse": lse}, {x: expected[x] for x in ("out", "lse")}, torch.float32)


def test_packed_sequences() -> None:
    q, k, v = attention_case(2.0**33, b=1, q=50, k=50)
    cu = torch.tensor([0, 7, 7, 50], dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 50, "max_seqlen_k": 50}
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    rows = [x[0].transpose(0, 1) for x in inputs]
    out = fused_attn.attention_varlen(*rows, **lengths, backend="triton")
    grads = torch.autograd.grad((out * gradient_like(out)).sum(), inputs)
    for start, end in ((0, 7), (7, 50)):
        part = [x[:, :, start:end].double().requires_grad_() for x in (q, k, v)]
        weights = (part[0] @ part[1].mT / 4).softmax(-1)
        expected = (weights @ part[2])[0].transpose(0, 1)
        dout = gradient_like(out)[start:end].double()
        of_part = torch.autograd.grad((expected * dout).sum(), part)
        check({"out": out[start:end]}, {"out": expected}, torch.float32)
        for x, y in zip(grads, of_part, strict=True):
            check({"gradient": x[:, :, start:end]}, {"gradient": y}, torch.float32)


def test_dropout_and_grouped_heads() -> None:
    """Finite, and the same shares of v as without huge scores: what is dropped is dropped."""
    q, k, v = attention_case(2.0**33, h=4, q=17, k=30)
    torch.manual_seed(0)
    inputs = [x.clone().requires_grad_() for x in (q, k[:, :2], v[:, :2])]
    out = attention(*inputs, dropout_p=0.5, backend="triton")
    expected = exactly(q, k[:, :2], v[:, :2])["out"]
    one_seen = exactly(q, k[:, :2], v[:, :2])["weights"].amax(-1) == 1.0
    kept = (out.detach().double() - 2.0 * expected).abs().amax(-1) == 0.0
    dropped = out.detach().abs().amax(-1) == 0.0
    assert (kept | dropped)[one_seen].all()
    assert 0.2 < dropped[one_seen].float().mean() < 0.8
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.isfinite().all()


def normalised(
    x: Tensor, weight: Tensor, rms: bool, eps: float, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """y and dx in float64, from the definition."""
    x = x.detach().double().requires_grad_()
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y, torch.autograd.grad(y, x, dy.double())[0]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("width", [4, 37, 20000])
@pytest.mark.parametrize("eps", [1e-5, 0.0, 1e-30])
def test_norms_of_rows_of_any_size(rms: bool, width: int, eps: float) -> None:
    """All in one tile, and wider than any."""
    norm = fused_attn.rms_norm if rms else fused_attn.layer_norm
    generator = torch.Generator().manual_seed(0)
    rows, weight, dy = (torch.randn(n, width, generator=generator) for n in (6, 1, 6))
    sizes = torch.tensor([1.0, 1e20, 3e38, 1e-20, 1e-30, 1e15])[:, None]
    x = (rows / rows.abs().amax(-1, keepdim=True) * sizes).requires_grad_()
    y = norm(x, (width,), weight[0], eps=eps, backend="triton")
    [dx] = torch.autograd.grad(y, x, dy)
    expected = normalised(x, weight[0], rms, eps, dy)
    for actual, exact in zip((y, dx), expected, strict=True):
        error = (actual.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
        assert (error < 64 * torch.finfo(torch.float32).eps).all(), error


@pytest.mark.parametrize("width", [1, 3, 37, 20000])
def test_a_norm_of_equal_numbers(width: int) -> None:
    """y = 0 and dx = (dy - its mean) / sqrt(eps), however large the numbers are."""
    dy = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([3.4e38, -3.4e38, 1e38, 1.7e38, 1.1e38])[:, None]
    x = sizes.repeat(1, width).requires_grad_()
    y = fused_attn.layer_norm(x, (width,), eps=1e-5, backend="triton")
    assert torch.equal(y, torch.zeros_like(y))
    [dx] = torch.autograd.grad(y, x, dy)
    expected = (dy - dy.double().mean(-1, keepdim=True)) / 1e-5**0.5
    assert ((dx - expected).abs() <= 1e-6 * dy.abs().amax() / 1e-5**0.5).all()


def test_a_norm_in_the_words_of_the_report() -> None:
    x = torch.tensor([[1e20, 2e20, 3e20, -1e20]])
    y = fused_attn.layer_norm(x, (4,), backend="triton")
    expected = torch.tensor([[-0.17, 0.51, 1.18, -1.52]])
    torch.testing.assert_close(y, expected, rtol=0.0, atol=0.01)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_of_any_size(activation: str) -> None:
    values = [1e20, -1e20, 3e38, -3e38, 1e7, -1e7, 1e4, -1e4, 20.0, -20.0, 1e-30]
    x = torch.tensor([values], requires_grad=True)
    y = fused_attn.bias_activation(x, activation=activation, backend="triton")
    [dx] = torch.autograd.grad(y.sum(), x)
    z = x.detach().double().requires_grad_()
    exact = {
        "relu": torch.relu, "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    }[activation](z)  # fmt: skip
    exact = torch.where(exact.isfinite(), exact, z.clamp_min(0.0))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    slope = torch.where(z.abs() > 100.0, (z > 0).double(), torch.nan)
    assert (dx.double() == slope)[slope.isfinite()].all()
    assert dx.isfinite().all()
    assert math.isclose(dx[0, -1].item(), 0.0 if activation == "relu" else 0.5, abs_tol=1.0)
