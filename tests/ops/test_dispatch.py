"""Choosing a backend: order, reasons, explanations, and errors that carry them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

import fused_attn
from fused_attn import UnsupportedError, attention
from fused_attn.ops import dispatch
from fused_attn.ops.operations import OPERATIONS, Operation
from fused_attn.runtime import native


class Problem:
    """Of nobody's operation: the choice looks at operands and gradients alone."""

    def __init__(self, operands: tuple[str, ...] = (), gradients: tuple[str, ...] = ()) -> None:
        self.operands, self.gradients = operands, gradients

    def __str__(self) -> str:
        return "the problem"


def backend(name: str, *reasons: str) -> SimpleNamespace:
    return SimpleNamespace(
        NAME=name,
        OPERANDS=frozenset(("mask", "slopes")),
        GRADIENTS=frozenset(("q",)),
        why_not=lambda problem: list(reasons),
    )


ABLE, REFUSING = backend("able"), backend("refusing", "too large", "wrong dtype")


def test_the_first_backend_without_reasons_is_chosen() -> None:
    assert dispatch.select((REFUSING, ABLE, backend("later")), Problem()) is ABLE


def test_a_backend_asked_for_by_name_runs_or_fails() -> None:
    assert dispatch.select((ABLE, backend("later")), Problem(), "later").NAME == "later"
    with pytest.raises(UnsupportedError, match="refusing: too large"):
        dispatch.select((ABLE, REFUSING), Problem(), "refusing")


def test_the_error_lists_the_problem_and_every_reason() -> None:
    with pytest.raises(UnsupportedError) as caught:
        dispatch.select((REFUSING, backend("other", "not here")), Problem())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("the problem")
    assert lines[1:] == [
        "  refusing: too large",
        "  refusing: wrong dtype",
        "  other: not here",
    ]
    assert isinstance(caught.value, NotImplementedError)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'able', 'refusing', got 'nobody'"):
        dispatch.select((ABLE, REFUSING), Problem(), "nobody")


def test_an_operand_that_a_backend_does_not_name_is_a_reason() -> None:
    """So that a new operand needs no change in a backend that does not serve it."""
    problem = Problem(operands=("mask", "news"))
    assert dispatch.why_not(ABLE, problem) == ["has no kernels for `news`"]
    newer = SimpleNamespace(**{**vars(ABLE), "NAME": "newer", "OPERANDS": {"mask", "news"}})
    assert dispatch.select((ABLE, newer), problem) is newer
    assert "able" in str(dispatch.explain((ABLE, newer), problem))
    with pytest.raises(UnsupportedError, match="able: has no kernels for `news`"):
        dispatch.select((ABLE, newer), problem, "able")


def test_a_gradient_that_a_backend_does_not_have_is_a_reason() -> None:
    problem = Problem(operands=("slopes",), gradients=("q", "slopes"))
    assert dispatch.why_not(ABLE, problem) == ["has no gradient of `slopes`"]
    assert dispatch.why_not(REFUSING, problem)[1:] == ["too large", "wrong dtype"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_backends_declare_operands_that_there_are(operation: Operation) -> None:
    fields = set(operation.operands._fields)
    for each in operation.backends:
        assert fields >= each.OPERANDS
        assert fields >= each.GRADIENTS
    assert operation.backends[-1].OPERANDS == fields  # the reference defines them all


def test_a_packed_call_that_wants_a_gradient_of_slopes_goes_where_there_is_one() -> None:
    q = torch.randn(5, 2, 8)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    slopes = torch.tensor([0.5, 0.25], requires_grad=True)
    out = fused_attn.attention_varlen(q, q, q, starts, starts, 5, 5, alibi_slopes=slopes)
    assert fused_attn.last_backend() == "reference"
    [grad] = torch.autograd.grad(out.square().sum(), slopes)
    assert grad.abs().min() > 0
    with pytest.raises(UnsupportedError, match="cpu: has no gradient of `alibi_slopes`"):
        fused_attn.attention_varlen(
            q, q, q, starts, starts, 5, 5, alibi_slopes=slopes, backend="cpu"
        )


def test_explain_says_who_runs_and_why_others_do_not() -> None:
    explanation = dispatch.explain((REFUSING, ABLE, backend("later")), Problem())
    assert explanation.chosen == "able"
    assert explanation.reasons[0] == ("refusing", ("too large", "wrong dtype"))
    text = str(explanation)
    assert "the problem" in text
    assert "too large; wrong dtype" in text
    assert "runs this" in text


def test_explain_of_a_call_agrees_with_what_runs() -> None:
    q = torch.randn(1, 2, 8, 4)
    chosen = fused_attn.explain(q, q, q, causal=True).chosen
    attention(q, q, q, causal=True)
    assert fused_attn.last_backend() == chosen


@pytest.mark.skipif(
    os.environ.get("FUSED_ATTN_NATIVE") == "off", reason="installed without the compiled part"
)
def test_the_compiled_backend_is_there_and_chosen_on_the_cpu() -> None:
    """Backends that are missing skip their tests; so this one says whether any is missing."""
    assert native.why_not() is None
    q = torch.randn(1, 2, 8, 4)
    assert fused_attn.explain(q, q, q).chosen == "cpu"


def test_a_missing_compiled_part_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "the compiled part is missing")
    q = torch.randn(1, 2, 9, 4)
    explanation = fused_attn.explain(q, q, q)
    assert explanation.chosen == "reference"
    assert "the compiled part is missing" in str(explanation)
    with pytest.raises(UnsupportedError, match="the compiled part is missing"):
        attention(q, q, q, backend="cpu", scale=0.123)


def test_the_reference_can_be_asked_for() -> None:
    q = torch.randn(1, 2, 8, 4)
    attention(q, q, q, backend="reference")
    assert fused_attn.last_backend() == "reference"


def test_signatures_are_told_apart() -> None:
    """A remembered plan must not serve a call that differs in any scalar, flag or operand."""
    q = torch.randn(1, 2, 8, 4)
    plain = attention(q, q, q)
    for arguments in (
        {"causal": True},
        {"window": (1, 1)},
        {"scale": 0.7},
        {"softcap": 0.5},
        {"mask": torch.eye(8, dtype=torch.bool)},
    ):
        assert not torch.allclose(attention(q, q, q, **arguments), plain)
    assert torch.equal(attention(q, q, q), plain)
