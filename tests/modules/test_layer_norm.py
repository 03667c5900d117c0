"""FusedLayerNorm, FusedRMSNorm and their residual forms against the torch.nn classes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from fused_attn import (
    FusedAddLayerNorm,
    FusedAddRMSNorm,
    FusedLayerNorm,
    FusedRMSNorm,
    FusedTransformerEncoderLayer,
)
from fused_attn.testing import check_against_oracle

PAIRS = {
    "layer": (FusedLayerNorm, nn.LayerNorm),
    "rms": (FusedRMSNorm, nn.RMSNorm),
    "add layer": (FusedAddLayerNorm, nn.LayerNorm),
    "add rms": (FusedAddRMSNorm, nn.RMSNorm),
}
ARGUMENTS = [
    {"normalized_shape": 24},
    {"normalized_shape": (3, 8), "eps": 1e-3},
    {"normalized_shape": [24], "elementwise_affine": False},
    {"normalized_shape": 24, "dtype": torch.bfloat16},
]


def filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_state_is_torch_s(name: str, arguments: dict) -> None:
    fused_class, torch_class = PAIRS[name]
    ours, theirs = fused_class(**arguments), filled(torch_class(**arguments))
    assert isinstance(ours, torch_class)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.normalized_shape == theirs.normalized_shape
    assert ours.eps == theirs.eps
    assert ours.extra_repr().startswith(theirs.extra_repr())


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_results_and_gradients_are_torch_s(name: str, arguments: dict) -> None:
    fused_class, torch_class = PAIRS[name]
    theirs = filled(torch_class(**arguments))
    ours = fused_class(**arguments)
    ours.load_state_dict(theirs.state_dict())
    dtype = arguments.get("dtype", torch.float32)
    x = torch.randn(5, 7, 3, 8) if len(theirs.normalized_shape) == 2 else torch.randn(5, 24)
    tensors = {"x": x.to(dtype).requires_grad_(), **dict(theirs.named_parameters())}
    ours_call, torch_call = (
        lambda x, module=module, **parameters: (functional_call(module, parameters, x),)
        for module in (ours, theirs)
    )
    check_against_oracle(ours_call, torch_call, tensors, ["y"])


def test_bias_can_be_left_out() -> None:
    ours, theirs = FusedLayerNorm(8, bias=False), nn.LayerNorm(8, bias=False)
    x = torch.randn(4, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert list(ours.state_dict()) == ["weight"]


def test_swapping_the_class_is_enough() -> None:
    for fused_class, torch_class in PAIRS.values():
        module = filled(torch_class(16))
        x, residual = torch.randn(3, 16), torch.randn(3, 16)
        adds = fused_class in (FusedAddLayerNorm, FusedAddRMSNorm)
        expected = module(x + residual if adds else x)
        module.__class__ = fused_class
        torch.testing.assert_close(module(x, residual) if adds else module(x), expected)
        assert "16" in repr(module)


@pytest.mark.parametrize("name", PAIRS)
def test_copies_and_pickles(name: str) -> None:
    module = filled(PAIRS[name][0](12))
    x = (torch.randn(2, 12), torch.randn(2, 12)) if "add" in name else (torch.randn(2, 12),)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*x), module(*x))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_mistakes_raise_what_torch_raises(name: str) -> None:
    ours, theirs = (kind(8) for kind in PAIRS[name])
    mistakes = [
        (torch.randn(3, 7),),
        (torch.ones(3, 8, dtype=torch.int64),),
        ([1.0],),
        (None,),
    ]
    for arguments in mistakes:
        with pytest.raises(Exception) as expected:  # noqa: PT011 torch's own type is the point
            theirs(*arguments)
        kind = TypeError if issubclass(expected.type, TypeError) else RuntimeError
        assert issubclass(expected.type, kind)
        with pytest.raises(kind, match="`x` must"):
            ours(*arguments)


def test_mixed_dtypes_are_refused_with_torch_s_type() -> None:
    x = torch.randn(3, 8)
    for module in (nn.LayerNorm(8, dtype=torch.bfloat16), FusedLayerNorm(8, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError):
            module(x)
    for kind in (FusedLayerNorm, nn.LayerNorm):
        module = kind(8)
        y = module(x.bfloat16())
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert module.weight.grad.dtype == torch.float32
    assert FusedRMSNorm(8, dtype=torch.bfloat16)(x).dtype == torch.float32


def test_autocast_on_the_cpu_leaves_norms_alone() -> None:
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert FusedLayerNorm(8)(x.to(dtype)).dtype == nn.LayerNorm(8)(x.to(dtype)).dtype


@pytest.mark.parametrize("return_sum", [False, True])
def test_add_layer_norm_is_the_norm_of_the_sum(return_sum: bool) -> None:
    module = filled(FusedAddLayerNorm(24, return_sum=return_sum))
    x, residual = torch.randn(4, 6, 24), torch.randn(4, 6, 24)
    result = module(x, residual)
    y = result[0] if return_sum else result
    expected = F.layer_norm(x + residual, (24,), module.weight, module.bias)
    torch.testing.assert_close(y, expected)
    if return_sum:
        assert torch.equal(result[1], x + residual)


def test_dropout_acts_in_training_only() -> None:
    for kind in (FusedAddLayerNorm, FusedAddRMSNorm):
        module = kind(50, dropout=0.5, return_sum=True)
        x, zeros = torch.ones(40, 50), torch.zeros(40, 50)
        assert set(module(x, zeros)[1].unique().tolist()) == {0.0, 2.0}
        assert torch.equal(module.eval()(x, zeros)[1], x)


def test_the_residual_stream_can_be_updated_in_place() -> None:
    module = filled(FusedAddLayerNorm(24)).requires_grad_(False)
    x, residual = torch.randn(6, 24), torch.randn(6, 24)
    y, total = module(x, residual), x + residual
    out = torch.empty(6, 24)
    assert module(x, residual, out=out, sum_out=residual) is out
    assert torch.equal(out, y)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("name", PAIRS)
def test_fullgraph_compile(name: str) -> None:
    torch._dynamo.reset()
    module = filled(PAIRS[name][0](24))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 24, requires_grad=True)
        arguments = (x, torch.randn(rows, 24)) if "add" in name else (x,)
        grads = []
        for run in (module, compiled):
            y = run(*arguments)
            grads.append((y, *torch.autograd.grad(y.sin().sum(), (x, module.weight))))
        for expected, actual in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)


def test_parametrized_weights_are_read_at_each_call() -> None:
    module = FusedLayerNorm(8)

    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    x = torch.randn(3, 8)
    expected = 2 * module(x)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Double())
    torch.testing.assert_close(module(x), expected)


def test_a_row_of_zeros_survives_a_missing_eps() -> None:
    """torch's default eps of RMSNorm is the epsilon of the arithmetic, not of the input."""
    x = torch.full((2, 8), 1e-4, dtype=torch.float16)
    expected = F.rms_norm(x.double(), (8,), None, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(FusedRMSNorm(8, dtype=torch.float16)(x).double(), expected,
                               rtol=2e-3, atol=0)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_tensors_that_want_torch_s_own_function_get_it(name: str) -> None:
    """NestedTensors, per-sample gradients by ExpandedWeight, and torch.fx's proxies."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    fused_class, torch_class = PAIRS[name]
    ours, theirs = fused_class(8), filled(torch_class(8))
    ours.load_state_dict(theirs.state_dict())
    parts = [torch.randn(n, 8, requires_grad=True) for n in (3, 5)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    torch.testing.assert_close(list(ours(x).unbind()), list(theirs(x).unbind()))
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(parts[0]), ours(parts[0]))
    if name == "layer":  # torch has no rule for rms_norm
        batch = torch.randn(4, 6, 8)
        for module in (ours, theirs):
            call_for_per_sample_grads(module)(batch).sin().sum().backward()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert mine.grad_sample.shape == (4, 8)
            torch.testing.assert_close(mine.grad_sample, other.grad_sample)


def test_rms_norm_with_an_offset_is_gemmas() -> None:
    """Gemma's: the weight starts as 0, and 1 is added to it in float32."""
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    for kind in (FusedRMSNorm, FusedAddRMSNorm):
        norm = kind(16, eps=1e-6, dtype=torch.bfloat16, weight_offset=1.0)
        assert (norm.weight == 0).all()
        assert "weight_offset=1" in repr(norm)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(16))
        rows = (x,) if kind is FusedRMSNorm else (x, torch.zeros_like(x))
        wide = x.float()
        expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        expected = (expected * (1.0 + norm.weight.float())).to(x.dtype)
        torch.testing.assert_close(norm(*rows), expected)
        assert (kind(16).weight == 1).all()
        assert "offset" not in repr(kind(16))
    with pytest.raises(ValueError, match="`weight_offset` must be 0 where `elementwise_affine`"):
        FusedRMSNorm(16, elementwise_affine=False, weight_offset=1.0)


@pytest.mark.parametrize("kind", [FusedLayerNorm, FusedAddLayerNorm, FusedRMSNorm, FusedAddRMSNorm])
def test_an_offset_is_added_to_the_weight(kind: Any) -> None:
    """As the same module whose weight is larger by it; it starts as torch's does."""
    ours, plain = (kind(8, dtype=torch.float64, weight_offset=w) for w in (0.75, 0.0))
    assert (ours.weight == 0.25).all()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(8))
        plain.weight.copy_(ours.weight + 0.75)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    rows = (x,) if kind in (FusedLayerNorm, FusedRMSNorm) else (x, torch.randn_like(x))
    for module in (ours, plain):
        module(*rows).sin().sum().backward()
    torch.testing.assert_close(ours(*rows), plain(*rows))
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    if kind in (FusedLayerNorm, FusedRMSNorm):
        traced = torch.fx.symbolic_trace(ours)
        torch.testing.assert_close(traced(x), plain(x), rtol=1e-12, atol=1e-12)
    if kind is FusedLayerNorm:  # torch has no RMSNorm of nested tensors
        parts = torch.nested.nested_tensor([x[:1].detach(), x[1:].detach()])
        for mine, theirs in zip(ours(parts).unbind(), plain(parts).unbind(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="`weight_offset` must be 0 where `elementwise_affine`"):
        kind(16, elementwise_affine=False, weight_offset=1.0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", [FusedLayerNorm, FusedRMSNorm])
def test_a_layer_adds_its_norms_offset(kind: Any, norm_first: bool) -> None:
    """Add and norm in one pass: the offset of a norm that somebody put there counts."""
    layer = FusedTransformerEncoderLayer(
        8, 2, 16, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    layer.norm1, layer.norm2 = (kind(8, dtype=torch.float64) for _ in range(2))
    expected = layer(x)
    for name in ("norm1", "norm2"):
        setattr(layer, name, kind(8, dtype=torch.float64, weight_offset=0.5))
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        layer.norm2.weight.add_(1.0)
    assert not torch.allclose(layer(x), expected)
