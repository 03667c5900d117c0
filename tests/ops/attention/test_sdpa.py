"""Our scaled_dot_product_attention in the place of torch's: same calls, same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from fused_attn import scaled_dot_product_attention

SHAPES = {
    "2-D": ((6, 8), (9, 8), (9, 5)),
    "3-D": ((4, 6, 8), (4, 9, 8), (4, 9, 8)),
    "4-D": ((2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 5)),
    "5-D": ((3, 2, 4, 6, 8), (3, 2, 4, 9, 8), (3, 2, 4, 9, 8)),
    "batch broadcasts": ((2, 4, 6, 8), (1, 4, 9, 8), (1, 4, 9, 8)),
    "query broadcasts": ((1, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    "one key head": ((2, 4, 6, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    "one value head": ((2, 4, 6, 8), (2, 4, 9, 8), (2, 1, 9, 8)),
    "one query head": ((2, 1, 6, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    "ranks differ": ((2, 4, 6, 8), (4, 9, 8), (9, 8)),
    "5-D broadcasts": ((3, 1, 4, 6, 8), (1, 2, 4, 9, 8), (4, 9, 8)),
    "empty batch": ((0, 4, 6, 8), (0, 4, 9, 8), (0, 4, 9, 8)),
}


def tensors(name: str) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES[name]]


def assert_same(
    q: Tensor, k: Tensor, v: Tensor, backend: str, *wanted: Tensor, **arguments: object
) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch_sdpa(q, k, v, **arguments)
    actual = scaled_dot_product_attention(q, k, v, backend=backend, **arguments)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    inputs = (q, k, v, *wanted)
    pairs = zip(
        torch.autograd.grad(actual, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes_and_broadcasting(attention_backend: str, name: str, is_causal: bool) -> None:
    assert_same(*tensors(name), attention_backend, is_causal=is_causal)


MASK_SHAPES = {
    "4-D": [(9,), (), (6, 9), (6, 1), (4, 6, 9), (1, 4, 6, 9), (2, 1, 1, 9), (2, 4, 6, 9)],
    "3-D": [(6, 9), (1, 9), (4, 6, 9), (1, 6, 9)],
    "2-D": [(6, 9), (9,)],
    "5-D": [(6, 9), (2, 4, 6, 9), (3, 1, 1, 1, 9), (3, 2, 4, 6, 9)],
    "one query head": [(2, 4, 6, 9), (4, 6, 9)],
}
MASK_CASES = [(name, shape) for name, shapes in MASK_SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(("name", "shape"), MASK_CASES)
def test_masks_broadcast(attention_backend: str, name: str, shape: tuple[int, ...]) -> None:
    q, k, v = tensors(name)
    mask = torch.rand(shape) < 0.8
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if len(shape) < 2:  # torch's own raises IndexError here, though its text says broadcastable
        expected = scaled_dot_product_attention(
            q, k, v, mask.expand(6, 9), backend=attention_backend
        )
        actual = scaled_dot_product_attention(q, k, v, mask, backend=attention_backend)
        assert torch.equal(actual, expected)
        return
    assert_same(q, k, v, attention_backend, attn_mask=mask)
    assert_same(q, k, v, attention_backend, bias, attn_mask=bias)


@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 4, 2), (6, 2, 3), (4, 4, 4), (4, 1, 1)])
def test_grouped_heads(attention_backend: str, heads: tuple[int, int, int]) -> None:
    q, k, v = (
        torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True)
        for h, n in zip(heads, (6, 9, 9), strict=True)
    )
    assert_same(q, k, v, attention_backend, enable_gqa=True, is_causal=True)


def test_scale_and_float32_mask_with_half_precision(attention_backend: str) -> None:
    q, k, v = (torch.randn(2, 4, 20, 16, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.randn(20, 20)
    actual = scaled_dot_product_attention(
        q, k, v, mask, scale=0.3, backend=attention_backend
    ).float()
    expected = torch_sdpa(q.float(), k.float(), v.float(), mask, scale=0.3)
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_causal_with_a_scale_that_is_not_positive(attention_backend: str, scale: float) -> None:
    """Torch's flash path masks before it scales: NaN, or finite and wrong."""
    q, k, v = tensors("4-D")
    q = q[:, :, :, :]
    allowed = torch.ones(6, 9, dtype=torch.bool).tril()
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch_sdpa(q, k, v, attn_mask=allowed, scale=scale)
    actual = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, backend=attention_backend
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["2-D", "3-D", "4-D", "5-D"])
def test_mask_and_causal_together_both_apply_at_every_rank(
    attention_backend: str, name: str
) -> None:
    """Torch applies both in 4-D and refuses in 3-D and on its math path."""
    q, k, v = tensors(name)
    mask = torch.rand(6, 9) < 0.8
    both = mask & torch.ones(6, 9, dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(q, k, v, both, backend=attention_backend)
    actual = scaled_dot_product_attention(q, k, v, mask, is_causal=True, backend=attention_backend)
    torch.testing.assert_close(actual, expected)


def test_a_number_of_keys_that_differs_from_that_of_values_is_refused() -> None:
    """Torch takes it from the values: shorter keys are read past their end."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (4, 5, 9))
    with pytest.raises(ValueError, match="`value` must have shape"):
        scaled_dot_product_attention(q, k, v)


def test_fully_masked_rows_are_zero(attention_backend: str) -> None:
    q, k, v = tensors("4-D")
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[2] = False
    out = scaled_dot_product_attention(q, k, v, mask, backend=attention_backend)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_autocast_computes_in_its_dtype(attention_backend: str) -> None:
    q, k, v = (torch.randn(2, 4, 20, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v, backend=attention_backend)
        expected = torch_sdpa(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16


def test_dropout_applies_whenever_it_is_not_zero(attention_backend: str) -> None:
    q, k, v = tensors("4-D")
    torch.manual_seed(1)
    dropped = scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend=attention_backend)
    assert not torch.allclose(
        dropped, scaled_dot_product_attention(q, k, v, backend=attention_backend)
    )


MISTAKES = {
    "rank": (((8,), (9, 8), (9, 8)), {}, ValueError, r"`query` must have at least 2 dimensions"),
    "heads": (((2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 8)), {}, ValueError, r"enable_gqa=True"),
    "grouped heads": (
        ((2, 4, 6, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
        {"enable_gqa": True},
        ValueError,
        r"`key` must have a number of heads that divides",
    ),
    "batch": (((2, 4, 6, 8), (3, 4, 9, 8), (3, 4, 9, 8)), {}, ValueError, r"must broadcast"),
    "mask": (
        ((6, 8), (9, 8), (9, 8)),
        {"attn_mask": torch.ones(6, 9, dtype=torch.int32)},
        TypeError,
        r"`attn_mask` must be torch.bool or",
    ),
    "mask shape": (
        ((4, 6, 8), (4, 9, 8), (4, 9, 8)),
        {"attn_mask": torch.ones(2, 1, 6, 9, dtype=torch.bool)},
        ValueError,
        r"`attn_mask` must be broadcastable to .*\(4, 6, 9\), got \(2, 1, 6, 9\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    shapes, arguments, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        scaled_dot_product_attention(*(torch.randn(shape) for shape in shapes), **arguments)


@pytest.mark.parametrize("scale", [np.float32(0.3), np.float64(0.3), torch.tensor(0.3), 1])
def test_any_number_is_a_scale(scale: Any) -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 8)
    expected = F.scaled_dot_product_attention(q, k, v, scale=float(scale))
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, scale=scale), expected)


@pytest.mark.parametrize("scale", ["0.3", [0.3], torch.ones(2)])
def test_what_is_no_number_is_no_scale(scale: Any) -> None:
    q = torch.randn(2, 3, 4, 8)
    if scale == "0.3":
        pytest.skip("a number all the same, to Python")
    with pytest.raises(TypeError, match="`scale` must be a number, got"):
        scaled_dot_product_attention(q, q, q, scale=scale)


@pytest.mark.parametrize("leading", [(2, 1, 3, 2), (1, 2, 1, 1, 3)])
def test_any_number_of_leading_dimensions(leading: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, *leading, 4, 8)
    mask = torch.rand(*leading[-2:], 4, 4) < 0.7
    mask |= torch.eye(4, dtype=torch.bool)
    for attn_mask in (None, mask):
        found = scaled_dot_product_attention(q, k, v, attn_mask)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask))


ZEROS = {
    "batch": (0, 2, 3, 4, 8),
    "heads": (2, 0, 3, 4, 8),
    "queries": (2, 2, 0, 4, 8),
    "keys": (2, 2, 3, 0, 8),
    "head size": (2, 2, 3, 4, 0),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ZEROS)
def test_sizes_of_zero_get_torchs_answer(name: str, is_causal: bool) -> None:
    batch, heads, queries, keys, size = ZEROS[name]
    q = torch.randn(batch, heads, queries, size, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, size, requires_grad=True) for _ in range(2))
    found = scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    if name == "keys":
        expected = expected.nan_to_num()  # where nothing is seen, 0: docs/differences.md
    torch.testing.assert_close(found, expected, equal_nan=True)
    found.sum().backward()
    assert q.grad is not None
