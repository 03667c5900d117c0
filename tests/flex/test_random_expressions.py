"""Random functions of score and positions, against float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_attn import flex_attention

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


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS, MASKS)
def test_forward_and_every_gradient(source, mask):
    q, k, v = inputs(0, B, H, LQ, D), inputs(3, B, H, LK, D), inputs(4, B, H, LK, D)
    points = [x.requires_grad_() for x in (q, k, v, TABLE.clone(), VECTOR.clone())]
    q, k, v, table, vector = points
    captured = {"table": table, "vector": vector}
    score_mod = function_of(f"({source}) + 0 * s", "s, b, h, q, kv", **captured)
    mask_mod = function_of(mask, "b, h, q, kv", **captured)
    out = flex_attention(q, k, v, score_mod, mask_mod)
    scores = q @ k.mT / math.sqrt(D)
    b, h, i, j = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    wide = {"table": table, "vector": vector}
    text = source.replace("table[h][q]", "table[h, q]")
    score = function_of(f"({text}) + 0 * s", "s, b, h, q, kv", **wide)(scores, b, h, i, j)
    visible = function_of(mask, "b, h, q, kv", **wide)(b, h, i, j)
    weights = torch.nan_to_num(score.masked_fill(~visible, -torch.inf).softmax(-1))
    wanted = weights @ v
    # What is made of positions alone torch computes in float32, and a last bit of that depends on
    # where in a tensor a number stands.
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    grads = [
        torch.autograd.grad(each.square().sum(), points, allow_unused=True)
        for each in (out, wanted)
    ]
    for mine, his in zip(*grads, strict=True):
        if mine is None or his is None:
            assert mine is None or not mine.any()
            assert his is None or not his.any()
        else:
            bound = 1e-6 * (1 + his.abs().max().item())
            torch.testing.assert_close(mine, his, rtol=1e-6, atol=bound)
