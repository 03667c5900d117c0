"""Random functions of score and positions, against float64."""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_attn import flex_attention
from fused_attn.ops.attention.jit import llvm

B, H, LQ, LK, D = 2, 2, 13, 17, 4
TABLE = torch.randn(H, LQ + LK, generator=torch.Generator().manual_seed(1)).double()
VECTOR = torch.randn(LK, generator=torch.Generator().manual_seed(2)).double()

_LEAVES = st.sampled_from([
    "s", "s", "s", "q * 0.1", "kv * 0.2", "(q - kv) * 0.3", "h * 0.5", "b * 0.25", "0.7 + 0 * q",
    "table[h, q - kv + 17]", "table[h][q]", "vector[kv]", "(kv >= q) * 1.0",
])  # fmt: skip
_UNARY = ["torch.tanh({})", "torch.sin({})", "({}).abs()", "-({})", "torch.sigmoid({})"]
_BINARY = ["({}) + ({})", "({}) - ({})", "({}) * ({})", "torch.maximum({} + 0 * s, {} + 0 * s)"]
_WHERE = ["torch.where(q >= kv, {} + 0 * s, {} + 0 * s)", "torch.where(({}) > 0, {} + 0 * s, s)"]


def _grown(inner):
    one = st.tuples(st.sampled_from(_UNARY), inner).map(lambda x: x[0].format(x[1]))
    two = st.tuples(st.sampled_from(_BINARY + _WHERE), inner, inner)
    return one | two.map(lambda x: x[0].format(x[1], x[2]))


EXPRESSIONS = st.recursive(_LEAVES, _grown, max_leaves=6)
MASKS = st.sampled_from(["q >= kv", "kv < 11", "(q - kv).abs() <= 4", "vector[kv] > 0", "kv >= 0"])


def function_of(source, names, **captured):
    return eval(f"lambda {names}: {source}", {"torch": torch, **captured})


def inputs(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def formula(points, source, mask, exact):
    """out by the formula on all pairs; parts made of positions alone as torch has them.

    Args:
        exact: have such parts in float64, where torch's own rules make float32 of them.
    """
    q, k, v, table, vector = points
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if exact else before)
    try:
        scores = q @ k.mT / math.sqrt(D)
        places = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
        captured = {"table": table, "vector": vector}
        text = source.replace("table[h][q]", "table[h, q]")
        score = function_of(f"({text}) + 0 * s", "s, b, h, q, kv", **captured)(scores, *places)
        visible = function_of(mask, "b, h, q, kv", **captured)(*places)
    finally:
        torch.set_default_dtype(before)
    return torch.nan_to_num(score.masked_fill(~visible, -torch.inf).softmax(-1)) @ v


def with_gradients(out, points):
    grads = torch.autograd.grad(out.square().sum(), points, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(points, grads, strict=True))
    return [out.detach(), *zeros]


def made_points(dtype):
    shapes = ((B, H, LQ, D), (B, H, LK, D), (B, H, LK, D))
    qkv = [inputs(3 * n, *shape) for n, shape in enumerate(shapes)]
    return [x.to(dtype, copy=True).requires_grad_() for x in (*qkv, TABLE, VECTOR)]


def by_flex(points, source, mask):
    *qkv, table, vector = points
    captured = {"table": table, "vector": vector}
    score_mod = function_of(f"({source}) + 0 * s", "s, b, h, q, kv", **captured)
    return flex_attention(*qkv, score_mod, function_of(mask, "b, h, q, kv", **captured))


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS, MASKS)
def test_forward_and_every_gradient(source, mask):
    """Parts made of positions alone are float32: what that costs torch's own operations is known.

    Ours may be as far from the exact result twice over, and where torch loses nothing by it, ours
    must not either.
    """
    points = made_points(torch.float64)
    ours = with_gradients(by_flex(points, source, mask), points)
    torchs = with_gradients(formula(points, source, mask, exact=False), points)
    exact = with_gradients(formula(points, source, mask, exact=True), points)
    for mine, his, right in zip(ours, torchs, exact, strict=True):
        rounding = 1e-9 * (1 + right.abs().max().item())
        bound = 2 * (his - right).abs().max().item() + rounding
        assert (mine - right).abs().max().item() <= bound


@pytest.mark.skipif(llvm.why_not() is not None, reason=str(llvm.why_not()))
@settings(max_examples=25, deadline=None)
@given(EXPRESSIONS, MASKS, st.sampled_from([torch.float32, torch.float64]))
def test_machine_code_gives_the_same_bits(source, mask, dtype):
    found = []
    for mode in ("on", "off"):
        with mock.patch.dict(os.environ, FUSED_ATTN_JIT=mode):
            points = made_points(dtype)
            found.append(with_gradients(by_flex(points, source, mask), points))
    assert all(torch.equal(code, interpreted) for code, interpreted in zip(*found, strict=True))
