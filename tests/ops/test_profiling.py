"""torch.profiler shows each operation under its name, with the backend that ran it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.operations import OPERATIONS, operation_of
from tests.ops.test_explain import CALLS

FUNCTIONS = [function for operation in OPERATIONS for function in operation.functions]


def names_of(run: Any) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return [event.name for event in seen.events()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_each_operation_has_a_range(function: Any, training: bool) -> None:
    x = torch.randn(2, 3, 4, 8, requires_grad=training)
    arguments, options = CALLS[function](x)

    def run() -> None:
        result = function(*arguments, **options)
        if training:
            (result[0] if isinstance(result, tuple) else result).sum().backward()

    run()
    backend = fused_attn.last_backend(function)
    operation = operation_of(function)
    name = operation.name
    found = names_of(run)
    assert found.count(f"fused_attn::{name}[{backend}]") == 1
    if training and not dispatch.is_formula(dispatch.find(operation.backends, backend)):
        assert found.count(f"fused_attn::{name}_backward[{backend}]") == 1


def test_a_tiny_call_is_the_same_under_the_profiler() -> None:
    q = torch.randn(1, 2, 4, 16, requires_grad=True)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = fused_attn.attention(q, q, q)
        return out, torch.autograd.grad(out.sin().sum(), q)[0]

    expected = run()
    with profile(activities=[ProfilerActivity.CPU]):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_reference_has_a_range_too() -> None:
    q = torch.randn(1, 2, 4, 16)
    found = names_of(lambda: fused_attn.attention(q, q, q, backend="reference"))
    assert "fused_attn::attention[reference]" in found


def test_nothing_is_recorded_when_nobody_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "record_function", None)
    x = torch.randn(2, 3, 4, 8)
    for function in FUNCTIONS:
        arguments, options = CALLS[function](x)
        function(*arguments, **options)
