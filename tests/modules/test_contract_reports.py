"""The contract with torch.nn: what `fuse`, `explain` and errors tell."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fused_attn
from fused_attn import fuse, unfuse
from tests.cases.contract import FF, E, H, L, N, attention, batch, in_mode

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested", "ignore:The PyTorch API of nested"),
]


def test_fuse_reports_and_unfuse_restores_everything() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(E, H, 1, 1, FF, 0.0, batch_first=True).eval()
    forward = {"forward": lambda self, x: nn.LayerNorm.forward(self, 2 * x)}
    model.own = type("Own", (nn.LayerNorm,), forward)(E)
    model.tied = model.encoder.layers[0].linear1
    parametrizations.weight_norm(model.encoder.layers[0].linear2)
    optimizer = torch.optim.SGD(model.parameters())
    seen = []
    model.encoder.norm.register_forward_hook(lambda *_: seen.append(1))
    inputs = batch()
    expected, before = model(*inputs), {n: type(m) for n, m in model.named_modules()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    report = fuse(model)
    assert "subclass of torch.nn.LayerNorm" in str(report)
    assert {s.name for s in report.swapped} >= {"", "encoder.layers.0.self_attn", "decoder.norm"}
    torch.testing.assert_close(model(*inputs), expected)
    assert held == [id(p) for p in model.parameters()]
    assert model.tied is model.encoder.layers[0].linear1
    assert len(seen) == 2
    unfuse(model)
    assert {n: type(m) for n, m in model.named_modules()} == before
    torch.testing.assert_close(model(*inputs), expected)


def test_last_backend_and_explain_tell_what_ran() -> None:
    module, (_, x) = attention(), batch()
    module(x, x, x)
    q = torch.randn(N, H, L, E // H)
    assert fused_attn.last_backend() == fused_attn.explain(q, q, q).chosen
    module.backend = "reference"
    module(x, x, x)
    assert fused_attn.last_backend() == "reference"


FAULTS = {
    "rank": (lambda x: {"query": x[None]}, AssertionError),
    "features": (lambda x: {"query": x[..., 1:]}, AssertionError),
    "padding size": (lambda x: {"key_padding_mask": torch.zeros(N, L + 1) > 0}, AssertionError),
    "mask size": (lambda x: {"attn_mask": torch.zeros(L, L + 1)}, RuntimeError),
    "integer mask": (lambda x: {"attn_mask": torch.zeros(L, L).int()}, AssertionError),
    "dtype": (lambda x: {n: x.double() for n in ("query", "key", "value")}, RuntimeError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_raises_torch_s_type_with_one_text_on_every_path(fault: str) -> None:
    change, kind = FAULTS[fault]
    x = batch()[1]
    texts = set()
    for mode in ("train", "eval", "no_grad"):
        for need_weights in (True, False):
            arguments = {
                "query": x,
                "key": x,
                "value": x,
                "need_weights": need_weights,
                **change(x),
            }
            with pytest.raises(kind) as caught:
                in_mode(attention(), mode, **arguments)
            assert caught.type is kind
            texts.add(str(caught.value))
    assert len(texts) == 1
