"""FusedFeedForward against its formula in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import FusedFeedForward
from fused_attn.testing import assert_within_budget, gradients

PLAIN = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
GATED = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def formula(ours: FusedFeedForward, name: str, x: Tensor) -> Tensor:
    h = F.linear(x, ours.linear1.weight, ours.linear1.bias)
    if name in GATED:
        gate, up = h.chunk(2, dim=-1)
        h = GATED[name](gate) * up
    else:
        h = PLAIN[name](h)
    return F.linear(h, ours.linear2.weight, ours.linear2.bias)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_within_the_error_budget(name: str, bias: bool, hooked: bool) -> None:
    ours = FusedFeedForward(12, 40, 0.0, name, bias=bias)
    exact = FusedFeedForward(12, 40, 0.0, name, bias=bias, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    if hooked:
        ours.linear1.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 5, 12)
    outputs = [ours(x), formula(ours, name, x), formula(exact, name, x.double())]
    assert_within_budget("output", *outputs)
    grads = [
        torch.cat([g.flatten() for g in gradients([out], list(model.parameters()))])
        for out, model in zip(outputs, (ours, ours, exact), strict=True)
    ]
    assert_within_budget("gradients", *grads, factor=3.0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), outputs[0])


def test_dropout_acts_in_training_only() -> None:
    ours = FusedFeedForward(8, 200, 0.5, "swiglu")
    x = torch.randn(4, 8)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_parameters_have_the_names_of_a_layers_feed_forward() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    ours = FusedFeedForward(8, 16)
    expected = {n: p.shape for n, p in layer.state_dict().items() if n.startswith("linear")}
    assert {n: p.shape for n, p in ours.state_dict().items()} == expected


@pytest.mark.parametrize(("arguments", "message"), [
    ({"activation": "tanh"}, "`activation` must be one of 'relu'.* got 'tanh'"),
    ({"dropout": 1.5}, r"`dropout` must be in \[0, 1\], got 1.5"),
])  # fmt: skip
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedFeedForward(8, **arguments)


def test_scripting_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="FusedFeedForward"):
        torch.jit.script(FusedFeedForward(8))


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    ours, x = FusedFeedForward(8, 16, 0.0, "swiglu"), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
