"""The swapped model is the model; three lines each."""

from __future__ import annotations

import copy

import torch
from model import Classifier

import fused_attn
from fused_attn.testing import assert_matches_reference, assert_parity

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])


def test_the_swapped_model_is_the_model() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    fused = copy.deepcopy(model)
    fused_attn.fuse(fused, linears=True)
    assert_parity(model, fused, (TOKENS,))


def test_the_attention_that_we_call(fused_attn_backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 16, 8).requires_grad_()
    assert_matches_reference(fused_attn.attention, q, k, v, causal=True, backend=fused_attn_backend)
