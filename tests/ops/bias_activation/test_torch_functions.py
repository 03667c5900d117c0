"""torch's own activations as a backend: what they can express is right, the rest they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.bias_activation import BACKENDS, call, torch_functions
from fused_attn.ops.bias_activation.problem import Operands
from fused_attn.runtime.activations import ACTIVATIONS
from tests.cases.bias_activation import Case

NAME = torch_functions.NAME
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = {
    "bias": Case(shape=(9, 65)),
    "no bias": Case(shape=(9, 65), bias=False),
    "gated": Case(shape=(9, 64), gated=True),
    "gated, no bias": Case(shape=(9, 64), gated=True, bias=False),
    "no rows": Case(shape=(0, 8)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name: str, activation: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(CASES[name], dtype=dtype, activation=activation)
    problem = call.problem_of(Operands(**case.tensors()), call.Scalars(activation, case.gated))
    assert dispatch.why_not(torch_functions, problem) == []
    case.check(NAME)


@pytest.mark.parametrize(
    ("activation", "function", "how"),
    [("relu", "relu", {}), ("silu", "silu", {}), ("gelu", "gelu", {"approximate": "none"}),
     ("gelu_tanh", "gelu", {"approximate": "tanh"})],
)  # fmt: skip
def test_torchs_function_is_what_runs(
    activation: str, function: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = getattr(F, function), []
    monkeypatch.setattr(F, function, lambda x, **given: asked.append(given) or real(x, **given))
    x, bias = torch.randn(3, 8), torch.randn(8)
    y = fused_attn.bias_activation(x, bias, activation=activation, backend=NAME)
    assert asked == [how]
    assert torch.equal(y, real(x + bias, **how))


def test_a_wider_bias_gives_the_promoted_type() -> None:
    x, bias = torch.randn(3, 8).bfloat16(), torch.randn(8)
    y = fused_attn.bias_activation(x, bias, activation="gelu", backend=NAME)
    torch.testing.assert_close(y, F.gelu(x.float() + bias))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_double_backward_is_right(activation: str, gated: bool) -> None:
    x, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True)
               for size in ((2, 6), (6,)))  # fmt: skip

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return fused_attn.bias_activation(x, bias, activation=activation, gated=gated, backend=NAME)

    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(run, (x, bias))


def test_in_place_and_out() -> None:
    x, bias = torch.randn(3, 8), torch.randn(8)
    expected = F.gelu(x + bias)
    out = torch.empty(3, 16)[:, ::2]
    assert fused_attn.bias_activation(x, bias, activation="gelu", out=out, backend=NAME) is out
    torch.testing.assert_close(out, expected)
    assert fused_attn.bias_activation(x, bias, activation="gelu", out=x, backend=NAME) is x
    torch.testing.assert_close(x, expected)


def test_nan_is_kept_by_every_activation() -> None:
    x = torch.tensor([torch.nan, 1.0])
    for activation in ACTIVATIONS:
        y = fused_attn.bias_activation(x, activation=activation, backend=NAME)
        assert y.isnan().tolist() == [True, False]


def test_it_compiles() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return fused_attn.bias_activation(x, activation="silu", gated=True, backend=NAME)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


def test_what_it_cannot_express_is_a_reason() -> None:
    x = torch.randn(3, 8)
    how = {"activation": "relu", "backend": NAME}
    with pytest.raises(fused_attn.UnsupportedError, match="has no kernels for `dropout_rng`"):
        fused_attn.bias_activation(x, dropout_p=0.1, **how)
    with pytest.raises(fused_attn.UnsupportedError, match="leaves transforms"):
        torch.func.vmap(lambda x: fused_attn.bias_activation(x, **how))(x)
    with pytest.raises(fused_attn.UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: fused_attn.bias_activation(x, **how), (x,), (x,))


def test_a_gpu_gets_it_where_ours_may_not_and_a_cpu_by_name_alone() -> None:
    problem = call.smallest(torch.device("cpu"), torch.float32)
    assert torch_functions.only_by_name(problem) == "our own kernels are faster here"
    on_gpu = dataclasses.replace(problem, device=torch.device("cuda:0"))
    assert torch_functions.only_by_name(on_gpu) is None
    told = fused_attn.explain(fused_attn.bias_activation, torch.ones(2, 8), activation="relu")
    assert told.chosen != NAME
    assert [backend.NAME for backend in BACKENDS][-2:] == [NAME, "reference"]
