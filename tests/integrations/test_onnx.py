"""ONNX: our modules and functions are exported as standard operators, and give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fused_attn

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 8))


# Of x (N, L, 16), both dynamic.
FUNCTIONS: dict[str, Any] = {
    "attention": lambda x: fused_attn.attention(*[heads(x)] * 3, layout="blhd").flatten(2),
    "causal": lambda x: fused_attn.attention(
        *[heads(x)] * 3, layout="blhd", causal="lower_right"
    ).flatten(2),
    "window, softcap": lambda x: fused_attn.attention(
        *[heads(x)] * 3, layout="blhd", window=(2, 1), softcap=3.0
    ).flatten(2),
    "padding": lambda x: fused_attn.attention(
        *[heads(x)] * 3, layout="blhd", key_padding_mask=x[..., 0] > -1.0
    ).flatten(2),
    "bias, sinks": lambda x: fused_attn.attention(
        *[heads(x)] * 3, layout="blhd", bias=x[:, None, None, :, 0], sinks=x[0, 0, :2]
    ).flatten(2),
    "lse": lambda x: fused_attn.attention(*[heads(x)] * 3, layout="blhd", return_lse=True)[1],
    "sdpa": lambda x: fused_attn.scaled_dot_product_attention(x, x, x, is_causal=True),
    "layer_norm": lambda x: fused_attn.layer_norm(x, (16,)),
    "rms_norm": lambda x: fused_attn.rms_norm(x, (16,)),
    "add_layer_norm": lambda x: sum(fused_attn.add_layer_norm(x, x, (16,), return_sum=True)),
    "gelu": lambda x: fused_attn.bias_activation(x, x[0, 0], activation="gelu"),
    "gated silu": lambda x: fused_attn.bias_activation(x, activation="silu", gated=True),
    "embedding": lambda x: fused_attn.embedding((x[..., 0] > 0).long(), x[0, :1].expand(4, 16)),
}
MODULES: dict[str, Any] = {
    "encoder": lambda: fused_attn.FusedTransformerEncoder(
        fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True), 2
    ),
    "encoder layer, norm first": lambda: fused_attn.FusedTransformerEncoderLayer(
        16, 2, 32, batch_first=True, norm_first=True, activation="gelu"
    ),
    "rms": lambda: fused_attn.FusedRMSNorm(16),
    "feed forward": lambda: fused_attn.FusedFeedForward(16, 32),
}


def check(module: nn.Module, path: Path) -> None:
    module = module.eval()
    x = torch.randn(2, 5, 16)
    dynamic = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=64)},)
    program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    [name] = [each.name for each in session.get_inputs()]
    for shape in ((2, 5, 16), (3, 9, 16), (1, 2, 16)):
        x = torch.randn(shape)
        [found] = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exported(name: str, tmp_path: Path) -> None:
    check(Call(FUNCTIONS[name]), tmp_path / "model.onnx")


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_exported(name: str, tmp_path: Path) -> None:
    check(MODULES[name](), tmp_path / "model.onnx")


def test_attention_with_weights_is_exported(tmp_path: Path) -> None:
    module = fused_attn.FusedMultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    program = torch.onnx.export(module, (x, x, x), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict.fromkeys(names, x.numpy()))
    for mine, expected in zip(found, module(x, x, x), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), expected, rtol=1e-4, atol=1e-5)


def test_an_exported_program_is_translated_too(tmp_path: Path) -> None:
    module, x = Call(FUNCTIONS["causal"]), torch.randn(2, 5, 16)
    exported = torch.export.export(module, (x,))
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-4, atol=1e-5)


def test_dropout_says_what_to_do() -> None:
    layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    with pytest.raises(Exception, match=r"model.eval") as caught:
        torch.onnx.export(layer.train(), (torch.randn(2, 5, 16),), dynamo=True, verbose=False)
    assert "has no translation into ONNX" in str(caught.value)
    assert "`fused_attn.unfuse(model)`" in str(caught.value)
