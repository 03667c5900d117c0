"""Fused models in tools that people really use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention, fuse
from fused_attn.fx import symbolic_trace

N, L, E, H = 3, 5, 16, 4


def encoder(fused: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    if fused:
        fuse(model)
    return model


@pytest.mark.parametrize("order", ["fuse first", "adapt first"])
def test_peft_lora_trains_and_runs_in_eval(order: str) -> None:
    """On torch.nn's layers the adapters act in training and are ignored in eval + no_grad."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["self_attn", "linear1"], init_lora_weights=False)
    stock = peft.get_peft_model(encoder(False), config)
    ours = peft.get_peft_model(encoder(order == "fuse first"), config)
    ours.load_state_dict(stock.state_dict())
    if order == "adapt first":
        fuse(ours)
    attention = ours.base_model.model.layers[0].self_attn
    assert type(attention.base_layer) is FusedMultiheadAttention
    x = torch.randn(N, L, E)
    expected = stock(x)
    out = ours(x)
    torch.testing.assert_close(out, expected)
    expected.sin().sum().backward()
    out.sin().sum().backward()
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        if theirs.requires_grad and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda m, n=name: n + m)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), expected)


def test_fx_keeps_our_modules_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder(True)
            self.attention = FusedMultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(x) + 1.0
            return self.attention(x, x, x)[0]

    model = Model()
    traced = symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["encoder", "attention"]
    x = torch.randn(N, L, E)
    torch.testing.assert_close(traced(x), model(x))
