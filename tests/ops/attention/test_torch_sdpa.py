"""torch's own attention as a backend: what it can express is right, the rest it refuses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.attention import BACKENDS, call, cuda, torch_sdpa
from fused_attn.ops.attention.problem import Operands
from fused_attn.runtime import processor
from fused_attn.testing import attention_noise, check_against_oracle, to_dtype
from tests.cases.attention import Case, run_plain
from tests.ops.attention.test_api import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def scalars(case: Case) -> call.Scalars:
    return case.scalars("sdpa")._replace(return_lse=False)


def expressible(case: Case) -> bool:
    problem = call.problem_of(Operands(**case.tensors(torch.float32)), scalars(case))
    return not dispatch.why_not(torch_sdpa, problem)


NAMES = [name for name, case in CASES.items() if expressible(case)]


def run(case: Case, **tensors: Tensor) -> tuple[Tensor]:
    return call.run(Operands(**tensors), scalars(case))[:1]


def plain(case: Case, **tensors: Tensor) -> tuple[Tensor | None, ...]:
    return run_plain(case, **tensors)[:1]


def test_most_masks_are_expressible() -> None:
    shown = {"causal", "lower right, empty rows", "window", "padding, empty sequence", "lengths"}
    assert shown | {"mask over heads", "bias over batch", "grouped heads"} <= set(NAMES)
    assert not {"dropout", "softcap", "alibi", "average", "sinks"} & set(NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    if name == "8 rows, wide" and dtype == torch.float32:
        pytest.skip("torch's flash kernel is a seventh over the budget in dk")
    tensors = case.tensors(dtype)
    wanted = [name for name, x in tensors.items() if x.requires_grad]

    def noise(outputs: Any, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
        """torch's backward starts from a stored lse, as ours does."""
        doubles = {**to_dtype(tensors, torch.float64), **dict(zip(wanted, inputs, strict=True))}
        return [0.0, *attention_noise(run_plain(case, **doubles), inputs, dtype)[3:]]

    check_against_oracle(
        functools.partial(run, case), functools.partial(plain, case), tensors, ("out",), noise
    )


def test_nan_where_nobody_looks_has_no_effect() -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    keep = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    expected = fused_attn.attention(q, k, v, key_padding_mask=keep, backend="reference")
    k[:, :, 4:], v[1] = torch.nan, torch.inf
    q.requires_grad_()
    found = fused_attn.attention(q, k, v, key_padding_mask=keep, backend="sdpa")
    torch.testing.assert_close(found, expected)
    [grad] = torch.autograd.grad(found.sum(), q)
    assert grad.isfinite().all()
    assert (found[1] == 0).all()


def test_double_backward_is_right() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    how = functools.partial(fused_attn.attention, causal=True, backend="sdpa")
    assert torch.autograd.gradgradcheck(how, (q, k, v))


def test_the_graph_can_be_walked_twice() -> None:
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    out = fused_attn.attention(q, q, q, backend="sdpa")
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out.sum(), q)[0])


def test_it_compiles() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 5, 4, requires_grad=True)

    def run(q: Tensor) -> Tensor:
        return fused_attn.attention(q, q, q, causal=True, backend="sdpa")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), run(q))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(q).sin().sum(), q)[0] for f in (compiled, run))
    )


REFUSED = {
    "lse": ({"return_lse": True}, "returns no lse"),
    "weights": ({"return_weights": "average"}, "returns no attention weights"),
    "softcap": ({"softcap": 2.0}, "knows no softcap"),
    "dropout": ({"dropout_p": 0.1}, "has no kernels for `dropout_rng`"),
    "alibi": ({"alibi_slopes": torch.ones(2)}, "has no kernels for `alibi_slopes`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_express_is_a_reason(name: str) -> None:
    arguments, reason = REFUSED[name]
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(fused_attn.UnsupportedError, match=reason):
        fused_attn.attention(q, q, q, backend="sdpa", **arguments)


def test_on_this_cpu_it_runs_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 5, 4).bfloat16()
    monkeypatch.setattr(processor, "has", lambda *_: False)
    told = fused_attn.explain(q, q, q)
    assert told.chosen != "sdpa"
    assert "sdpa       runs only when it is asked for by name (our own kernels are faster" in str(
        told
    )
    for ours, of_bfloat16 in ((False, "sdpa"), (True, told.chosen)):
        monkeypatch.setattr(processor, "has", lambda *wanted: "amx_tile" in wanted)
        monkeypatch.setattr(processor, "our_tiles", lambda ours=ours: ours)
        assert fused_attn.explain(q, q, q).chosen == of_bfloat16
        assert fused_attn.explain(q.half(), q.half(), q.half()).chosen != "sdpa"
        assert fused_attn.explain(q.float(), q.float(), q.float()).chosen != "sdpa"
    monkeypatch.setattr(processor, "has", lambda *wanted: "amx_fp16" in wanted)
    assert fused_attn.explain(q.half(), q.half(), q.half()).chosen == "sdpa"


@pytest.mark.parametrize(("value", "chosen"), [("", "cpu"), ("-cpu", "reference"), ("sdpa", "sdpa"),
                                               ("-cpu, +sdpa", "sdpa")])  # fmt: skip
def test_backends_are_switched_by_the_environment(
    value: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch.why_not(BACKENDS[-2], call.smallest(
        torch.device("cpu"), torch.float32)):  # fmt: skip
        pytest.skip("another machine")
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", value)
    q = torch.randn(1, 2, 5, 4)
    told = fused_attn.explain(q, q, q)
    assert told.chosen == chosen
    if value.startswith("-cpu"):
        assert "FUSED_ATTN_BACKENDS switches it off" in str(told)
    assert fused_attn.explain(q, q, q, backend="cpu").chosen == "cpu"  # by name it always runs


def test_it_stands_behind_ours_and_before_the_formula() -> None:
    names = [backend.NAME for backend in BACKENDS]
    assert names.index(cuda.NAME) < names.index("sdpa") < names.index("reference")
