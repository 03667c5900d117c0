"""Scores of one query a head: the CPU has a way of its own for these, without tiles of queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.testing.budget import assert_within_budget

LENGTHS = [1, 16, 127, 300]


def calls(batch: int, heads: int, keys: int, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Biases in every layout and with holes, alone and with what else changes a score."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    holes = draw(batch, 1, 1, keys)
    holes[..., ::3] = -math.inf
    holes[0] = -math.inf  # a row that sees nothing
    each = draw(batch, heads, 1, keys)
    each[:, 0, :, : keys // 2] = -math.inf
    mask = torch.rand(batch, 1, 1, keys) < 0.7
    slopes = torch.rand(heads)
    return {
        "a head each": {"bias": each},
        "shared, holes": {"bias": holes},
        "one number": {"bias": draw(1, 1, 1, 1).expand(batch, heads, 1, keys)},
        "strided": {"bias": draw(batch, 1, keys, 2)[..., 0][:, :, None]},
        "float32": {"bias": each.float() if dtype != torch.float64 else each},
        "mask": {"bias": each, "mask": mask},
        "lengths": {"bias": each, "key_lengths": torch.arange(batch).clamp(max=keys)},
        "alibi": {"alibi_slopes": slopes},
        "alibi, bias": {"alibi_slopes": slopes, "bias": each},
        "softcap": {"softcap": 2.0},
        "everything": {"softcap": 2.0, "alibi_slopes": slopes, "bias": holes, "mask": mask},
    }


def refused(backend: str, *tensors: Tensor, **arguments: Tensor) -> str | None:
    try:
        fused_attn.attention(*tensors, backend=backend, **arguments)
    except fused_attn.UnsupportedError as error:
        return str(error)
    return None


NAMES = list(calls(2, 2, 4, torch.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_query_a_head(attention_backend: str, dtype: torch.dtype, keys: int, name: str) -> None:
    batch, heads, heads_kv, size = 3, 4, 2, 24
    arguments = calls(batch, heads, keys, dtype)[name]
    q = torch.randn(batch, heads, 1, size, dtype=dtype)
    k, v = torch.randn(2, batch, heads_kv, keys, size, dtype=dtype)
    if (why := refused(attention_backend, q, k, v, **arguments)) is not None:
        pytest.skip(why)
    doubles = {n: x.double() if n == "bias" else x for n, x in arguments.items()}
    oracle = fused_attn.attention(
        q.double(), k.double(), v.double(), backend="reference", **doubles
    )
    found = fused_attn.attention(q, k, v, backend=attention_backend, **arguments)
    if dtype == torch.float64:  # as exact as its oracle
        torch.testing.assert_close(found, oracle, rtol=1e-13, atol=1e-13)
        return
    plain = fused_attn.attention(q, k, v, backend="reference", **arguments)
    assert_within_budget("out", found, plain, oracle)


@pytest.mark.parametrize("name", ["shared, holes", "everything"])
@pytest.mark.parametrize("queries", [1, 2])
def test_keys_that_a_bias_hides_may_hold_nan(
    attention_backend: str, queries: int, name: str
) -> None:
    arguments = calls(2, 4, 150, torch.float32)[name]
    q = torch.randn(2, 4, queries, 16)
    k, v = torch.randn(2, 2, 2, 150, 16)
    wanted = fused_attn.attention(q, k, v, backend=attention_backend, **arguments)
    k[:, :, ::3], v[:, :, ::3] = math.nan, math.inf  # hidden by the bias
    found = fused_attn.attention(q, k, v, backend=attention_backend, **arguments)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
