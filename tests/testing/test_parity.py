"""What users run in their own CI: `assert_parity` and `assert_matches_reference`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn.testing import assert_matches_reference, assert_parity


class Model(nn.Module):
    """Tokens in, a dictionary out; with a buffer and a mask by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens, padding=None):
        x = self.embedding(tokens) * self.scale
        x = self.norm(self.layer(x, src_key_padding_mask=padding))
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        return {"hidden": x, "pooled": (x.mean(1), tokens)}


def pair():
    torch.manual_seed(0)
    model = Model().eval()
    fused = copy.deepcopy(model)
    fused_attn.fuse(fused)
    tokens = torch.randint(0, 20, (3, 7))
    return model, fused, tokens, torch.arange(7) >= torch.tensor([7, 4, 2])[:, None]


def test_a_fused_model_is_at_par() -> None:
    model, fused, tokens, padding = pair()
    assert_parity(model, fused, (tokens,))
    assert_parity(model, fused, (tokens, padding))
    assert_parity(model, fused, {"tokens": tokens, "padding": padding})
    x = torch.randn(2, 5, 16)
    assert_parity(model.layer, fused.layer, (x,))


def test_what_is_wrong_is_named() -> None:
    model, fused, tokens, _ = pair()
    fused.norm.forward = lambda x: nn.functional.layer_norm(
        x, (16,), fused.norm.weight, fused.norm.bias, 1e-3
    )
    with pytest.raises(AssertionError, match="output 0: error"):
        assert_parity(model, fused, (tokens,))


def test_models_that_cannot_be_compared() -> None:
    model, fused, tokens, _ = pair()
    with pytest.raises(ValueError, match="without dropout"):
        assert_parity(model, fused.train(), (tokens,))
    fused.eval()
    with torch.no_grad():
        fused.norm.weight += 1
    with pytest.raises(ValueError, match=r"norm.weight differs"):
        assert_parity(model, fused, (tokens,))
    with pytest.raises(ValueError, match="only one has"):
        assert_parity(model, model.layer, (tokens,))


def test_functions_against_their_formulas() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(9, 9) > 0.3
    assert_matches_reference(fused_attn.attention, q, k, v, causal=True, mask=mask, return_lse=True)
    x = torch.randn(5, 16, requires_grad=True)
    weight, bias = (torch.randn(16, requires_grad=True) for _ in range(2))
    assert_matches_reference(fused_attn.layer_norm, x, (16,), weight, bias, eps=1e-4)
    assert_matches_reference(fused_attn.linear, x, torch.randn(8, 16, requires_grad=True))

    def wrong(q, backend=None):
        return q * 2 if backend == "reference" else q * 2.001

    with pytest.raises(AssertionError, match="output 0"):
        assert_matches_reference(wrong, q)


def test_one_tensor_may_stand_for_several_arguments() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    assert_matches_reference(fused_attn.attention, q, q, q, causal=True)
