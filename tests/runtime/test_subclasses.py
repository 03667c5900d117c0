"""Objects that are tensors by class: understood, or refused by name in every operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attn
from fused_attn.ops.operations import OPERATIONS
from tests.ops.test_explain import CALLS

FUNCTIONS = [function for operation in OPERATIONS for function in operation.functions]


class Plain(Tensor):
    """Changes nothing: as dozens of libraries mark their tensors."""


class Secret(Tensor):
    """Has rules of its own, and memory that means nothing."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_subclass_with_its_own_rules_is_refused_by_name(function: Any) -> None:
    arguments, options = CALLS[function](torch.randn(2, 3, 4, 8).as_subclass(Secret))
    with pytest.raises(TypeError, match=r"(?s)must be a plain tensor, got a Secret, .*as_subclass"):
        function(*arguments, **options)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [Plain, torch.nn.Parameter, torch.nn.Buffer])
def test_a_subclass_that_changes_nothing_is_taken(function: Any, kind: Any) -> None:
    x = torch.randn(2, 3, 4, 8)
    marked = x.as_subclass(Plain) if kind is Plain else kind(x)
    with torch.no_grad():
        arguments, options = CALLS[function](marked)
        result = function(*arguments, **options)
        arguments, options = CALLS[function](x)
        torch.testing.assert_close(result, function(*arguments, **options), check_dtype=True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_sparse_tensors_are_refused_with_the_way_out(function: Any) -> None:
    arguments, options = CALLS[function](torch.eye(8).expand(2, 3, 8, 8).contiguous())
    sparse = [
        x.to_sparse() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    ]
    with pytest.raises(TypeError, match=r"must be dense, got layout torch.sparse_coo\nhint: "):
        function(*sparse, **options)


SHAPES = [(3, 3), (3, 5), (5, 3)]


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_is_what_torch_takes_it_for(make: Any, lengths: tuple[int, int]) -> None:
    if make is causal_lower_right and lengths[0] > lengths[1]:
        pytest.skip("torch gives NaN for rows that see no key, we give 0")
    q = torch.randn(2, 4, lengths[0], 8)
    k, v = torch.randn(2, 2, 4, lengths[1], 8)
    mask = make(*lengths)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours = fused_attn.scaled_dot_product_attention
    torch.testing.assert_close(ours(q, k, v, attn_mask=mask), expected)
    torch.testing.assert_close(ours(q[0], k[0], v[0], attn_mask=mask), expected[0])
    for name in ("mask", "bias"):
        torch.testing.assert_close(fused_attn.attention(q, k, v, **{name: mask}), expected)
    assert fused_attn.explain(q, k, v, mask=mask).chosen


def test_a_causal_bias_and_causal_both_hold() -> None:
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    found = fused_attn.attention(q, k, v, causal=True, mask=causal_lower_right(3, 5))
    torch.testing.assert_close(found, fused_attn.attention(q, k, v, causal=True))
    other = torch.rand(3, 5) < 0.6
    both = fused_attn.attention(q, k, v, bias=causal_lower_right(3, 5), mask=other)
    torch.testing.assert_close(
        both, fused_attn.attention(q, k, v, causal="lower_right", mask=other)
    )


def test_a_causal_bias_of_other_lengths_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"`mask` must be for lengths .* = \(3, 3\), got \(3, 4\)"):
        fused_attn.attention(q, q, q, mask=causal_lower_right(3, 4))
    with pytest.raises(ValueError, match="`is_causal` must be False"):
        fused_attn.scaled_dot_product_attention(
            q, q, q, attn_mask=causal_lower_right(3, 3), is_causal=True
        )


def test_the_module_takes_a_causal_bias() -> None:
    module = fused_attn.FusedMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    triangle = torch.ones(3, 3, dtype=torch.bool).triu(1)
    expected, weights = module(x, x, x, attn_mask=triangle)
    found, mine = module(x, x, x, attn_mask=causal_upper_left(3, 3))
    torch.testing.assert_close((found, mine), (expected, weights))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_get_torchs_answer(layout: torch.layout) -> None:
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    if layout == torch.jagged:
        nested = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    else:  # torch wants these contiguous
        nested = torch.nested.nested_tensor([x.transpose(0, 1) for x in parts], layout=layout)
    found = fused_attn.scaled_dot_product_attention(nested, nested, nested)
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)
