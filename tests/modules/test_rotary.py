"""Rotary position embedding inside FusedMultiheadAttention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import FusedMultiheadAttention, FusedTransformerEncoderLayer
from fused_attn.modules.packing import Sequences
from fused_attn.modules.positions import rotate

E, H, D = 24, 3, 8


def formula(module: FusedMultiheadAttention, x: Tensor, causal: bool = False) -> Tensor:
    """Self-attention of x (N, L, E) with each head's halves as complex numbers, turned by e^ipθ."""
    q, k, v = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in (q, k, v))
    theta = torch.arange(x.shape[1])[:, None] * 100.0 ** (-torch.arange(D // 2) * 2.0 / D)
    turn = torch.polar(torch.ones_like(theta), theta)
    q, k = (torch.complex(*y.chunk(2, dim=-1)) * turn for y in (q, k))
    scores = (q @ k.conj().transpose(-1, -2)).real / math.sqrt(D)
    if causal:
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1) @ v
    return module.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_complex_form(causal: bool) -> None:
    module = FusedMultiheadAttention(E, H, batch_first=True, rotary_base=100.0)
    x = torch.randn(2, 9, E, requires_grad=True)
    out, weights = module(x, x, x, is_causal=causal)
    expected = formula(module, x, causal)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    inputs = (x, module.in_proj_weight)
    grads = (torch.autograd.grad(y.sin().sum(), inputs) for y in (out, expected))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_layouts_agree() -> None:
    module = FusedMultiheadAttention(E, H, batch_first=True, rotary_base=100.0)
    x = torch.randn(2, 9, E)
    expected = module(x, x, x)[0]
    torch.testing.assert_close(module(x[0], x[0], x[0])[0], expected[0])
    nested = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
    parts = module(nested, nested, nested, need_weights=False)[0].unbind()
    torch.testing.assert_close(parts[0], expected[0])
    torch.testing.assert_close(parts[1], module(*[x[1, :5]] * 3)[0])
    module.batch_first = False
    y = x.transpose(0, 1)
    torch.testing.assert_close(module(y, y, y)[0].transpose(0, 1), expected)


def test_packed_layers_agree_with_padded_ones() -> None:
    layer = FusedTransformerEncoderLayer(E, H, 32, 0.0, batch_first=True)
    layer.self_attn.rotary_base = 100.0
    x = torch.randn(3, 7, E)
    padding = torch.arange(7) >= torch.tensor([7, 0, 4])[:, None]
    packed = layer(x, src_key_padding_mask=padding)
    layer.pack_padding = False
    padded = layer(x, src_key_padding_mask=padding)
    torch.testing.assert_close(packed[~padding], padded[~padding])


def test_packed_queries_and_keys_count_in_their_own_sequences() -> None:
    """Of unequal lengths: a position that counted on from the sequence before would tell."""
    module = FusedMultiheadAttention(E, H, batch_first=True)
    module.rotary_base = 100.0
    queries, keys = torch.randn(8, E).split([3, 5]), torch.randn(9, E).split([7, 2])
    together = module.attend_packed(
        torch.cat(queries),
        torch.cat(keys),
        torch.cat(keys),
        Sequences(torch.tensor([0, 3, 8], dtype=torch.int32), 5),
        Sequences(torch.tensor([0, 7, 9], dtype=torch.int32), 7),
    )
    alone = [module(q, k, k, need_weights=False)[0] for q, k in zip(queries, keys, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_scores_depend_on_distances_alone() -> None:
    q, k = torch.randn(2, 1, D, dtype=torch.float64).unbind()
    near, far = (
        rotate(q, torch.tensor([p]), 1e4) @ rotate(k, torch.tensor([p + 5]), 1e4).T
        for p in (0, 100_000)
    )
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-8)
    x = torch.randn(4, D).bfloat16()
    assert rotate(x, torch.arange(4), 1e4).dtype == torch.bfloat16
    assert torch.equal(rotate(x, torch.zeros(4, dtype=torch.int64), 1e4), x)


def test_state_is_torchs_and_none_is_torchs_attention() -> None:
    stock = nn.MultiheadAttention(E, H)
    ours = FusedMultiheadAttention(E, H, rotary_base=1e4)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    ours.rotary_base = None
    x = torch.randn(5, 2, E)
    torch.testing.assert_close(ours(x, x, x)[0], stock(x, x, x)[0])


def test_unfuse_leaves_it_alone_and_says_why() -> None:
    model = nn.Sequential(
        FusedMultiheadAttention(E, H, rotary_base=1e4), FusedMultiheadAttention(E, H)
    )
    report = fused_attn.unfuse(model)
    assert type(model[0]) is FusedMultiheadAttention
    assert type(model[1]) is nn.MultiheadAttention
    assert [(m.name, m.reason) for m in report.left_alone] == [
        ("0", "torch.nn has no rotary position embedding")
    ]


@pytest.mark.parametrize(("heads", "base", "kind", "message"), [
    (8, 1e4, ValueError, "`rotary_base` needs an even head size, got 3"),
    (3, 0.0, ValueError, "`rotary_base` must be positive, got 0.0"),
    (3, "10000", TypeError, "`rotary_base` must be a number, got str"),
])  # fmt: skip
def test_mistakes_are_named(heads: int, base: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        FusedMultiheadAttention(E, heads, rotary_base=base)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    module = FusedMultiheadAttention(E, H, batch_first=True, rotary_base=1e4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, E)
    torch.testing.assert_close(compiled(x, x, x)[0], module(x, x, x)[0])
