"""`explain` and `last_backend`: what they say is what runs, for every operation and for modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.ops.operations import OPERATIONS
from fused_attn.runtime import native

TOKENS = torch.zeros(2, 3, dtype=torch.int64)
STARTS = torch.tensor([0, 2], dtype=torch.int32)

# A call of every public function, of one float tensor (2, 3, 4, 8).
CALLS: dict[Any, Any] = {
    fused_attn.attention: lambda x, **o: ((x, x, x), o),
    fused_attn.attention_varlen: lambda x, **o: (
        (x[0, 0, :2, None], x[0, 0, :2, None], x[0, 0, :2, None], STARTS, STARTS, 2, 2), o
    ),
    fused_attn.scaled_dot_product_attention: lambda x, **o: ((x, x, x), {}),
    fused_attn.layer_norm: lambda x, **o: ((x, (8,)), o),
    fused_attn.rms_norm: lambda x, **o: ((x, (8,)), o),
    fused_attn.add_layer_norm: lambda x, **o: ((x, x, (8,)), o),
    fused_attn.add_rms_norm: lambda x, **o: ((x, x, (8,)), o),
    fused_attn.bias_activation: lambda x, **o: ((x,), {"activation": "relu", **o}),
    fused_attn.embedding: lambda x, **o: ((TOKENS, x[0, 0]), o),
    fused_attn.linear: lambda x, **o: ((x, x[0, 0]), o),
}  # fmt: skip
FUNCTIONS = [function for operation in OPERATIONS for function in operation.functions]


def call(function: Any, x: Tensor, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return CALLS[function](x, **options)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_is_explained_is_what_runs(function: Any) -> None:
    arguments, options = call(function, torch.randn(2, 3, 4, 8))
    told = fused_attn.explain(function, *arguments, **options)
    function(*arguments, **options)
    assert fused_attn.last_backend(function) == told.chosen
    assert "runs this" in str(told)


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_level_is_told(function: Any) -> None:
    arguments, options = call(function, torch.randn(2, 3, 4, 8))
    told = fused_attn.explain(function, *arguments, **options, backend="cpu")
    assert f"cpu        runs this (level {native.module().cpu_level()}" in str(told)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_explaining_computes_nothing(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, options = call(function, torch.randn(2, 3, 4, 8))
    function(*arguments, **options)  # a plan is there
    for operation in OPERATIONS:
        for backend in operation.backends:
            monkeypatch.setattr(backend, "forward", None)
    assert fused_attn.explain(function, *arguments, **options).chosen


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_inside_transforms_the_formula_runs_and_is_told(function: Any) -> None:
    told = []

    def run(x: Tensor) -> Tensor:
        arguments, options = call(function, x)
        told.append(fused_attn.explain(function, *arguments, **options))
        result = function(*arguments, **options)
        told.append(fused_attn.last_backend(function))
        return (result[0] if isinstance(result, tuple) else result).sum()

    x = torch.randn(5, 2, 3, 4, 8)
    torch.func.vmap(run)(x)
    torch.func.grad(run)(x[0])
    # torch's own product is a formula, too.
    formula = "torch" if function is fused_attn.linear else "reference"
    assert [told[0].chosen, told[1], told[2].chosen, told[3]] == [formula] * 4
    assert "cannot be looked into by torch.func" in str(told[0])


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_kernel_asked_for_by_name_inside_a_transform_is_refused(function: Any) -> None:
    if function is fused_attn.scaled_dot_product_attention:
        pytest.skip("torch's signature names no backend")

    def run(x: Tensor) -> Tensor:
        arguments, options = call(function, x, backend="cpu")
        result = function(*arguments, **options)
        return (result[0] if isinstance(result, tuple) else result).sum()

    x = torch.randn(2, 3, 4, 8)
    run(x)
    with pytest.raises(fused_attn.UnsupportedError, match="cpu: cannot be looked into"):
        torch.func.grad(run)(x)
    run(x)  # and the refusal leaves nothing behind
    assert fused_attn.last_backend(function) == "cpu"


def test_a_module_explains_its_calls() -> None:
    layer = fused_attn.FusedTransformerEncoderLayer(8, 2, batch_first=True).eval()
    told = fused_attn.explain(layer, torch.randn(2, 3, 8))
    assert told.module == "FusedTransformerEncoderLayer"
    operations = [str(each).split(" on ")[0] for each in told.calls]
    assert operations == ["attention", "layer_norm", "bias_activation", "layer_norm"]
    assert str(told).count("runs this") == 4


def test_a_module_without_our_operations_says_so() -> None:
    assert "runs no operation" in str(fused_attn.explain(torch.nn.Linear(2, 2), torch.ones(1, 2)))


@pytest.mark.parametrize("name", ["flex_attention", "attention_backward"])
def test_a_function_made_of_others_explains_their_calls(name: str) -> None:
    q = torch.randn(1, 2, 5, 4)
    out, lse = fused_attn.attention(q, q, q, return_lse=True)
    rest = (out, lse) if name == "attention_backward" else ()
    told = fused_attn.explain(getattr(fused_attn, name), *[q] * (4 if rest else 3), *rest)
    assert told.module == name
    assert [call.chosen for call in told.calls] == [fused_attn.explain(q, q, q).chosen]


def test_functions_that_are_no_operands_are_told_of() -> None:
    q = torch.randn(1, 2, 5, 4)
    told = fused_attn.explain(
        fused_attn.flex_attention, q, q, q, score_mod=lambda s, b, h, i, j: s * s.abs()
    )
    assert told.notes[0].startswith(("runs in the kernel's own loop", "runs by tiles: "))
    assert "runs no operation" not in str(told)


def test_a_function_of_torchs_own_functions_says_so() -> None:
    q = torch.randn(1, 2, 5, 4)
    told = fused_attn.explain(fused_attn.merge_attention, q, q.sum(-1), q, q.sum(-1))
    assert "runs no operation" in str(told)


def test_who_cannot_be_explained_is_told_who_can() -> None:
    with pytest.raises(TypeError, match="`function` must be one of attention, attention_varlen"):
        fused_attn.explain(torch.relu, torch.ones(1))


def test_wrong_calls_are_refused_as_the_function_refuses_them() -> None:
    with pytest.raises(ValueError, match="normalized_shape"):
        fused_attn.explain(fused_attn.layer_norm, torch.ones(2, 3), (4,))
    with pytest.raises(TypeError, match="unexpected argument `sparkle`"):
        fused_attn.explain(torch.ones(1, 1, 1, 1), *[torch.ones(1, 1, 1, 1)] * 2, sparkle=1)
