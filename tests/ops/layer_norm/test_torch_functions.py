"""torch's own norms as a backend: what they can express is right, the rest they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.layer_norm import BACKENDS, call, torch_functions
from fused_attn.ops.layer_norm.problem import Operands
from tests.cases.layer_norm import DTYPES, Case

NAME = torch_functions.NAME
CASES = {
    "layer": Case((9, 65)),
    "rms": Case((9, 65), rms=True),
    "two dimensions": Case((2, 3, 4, 5), dims=2),
    "no parameters": Case((5, 48), weight=False, bias=False),
    "bias alone": Case((5, 48), weight=False),
    "post": Case((5, 48), residual="post"),
    "pre": Case((5, 48), residual="pre", rms=True),
    "no rows": Case((0, 7)),
    "one column": Case((5, 1)),
    "transposed": Case((4, 3, 20), strides="transposed", residual="pre"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(CASES[name], dtype=dtype)
    problem = call.problem_of(
        Operands(**case.tensors()), call.Scalars(case.row, case.eps, case.rms)
    )
    assert dispatch.why_not(torch_functions, problem) == []
    case.check(NAME)


@pytest.mark.parametrize("rms", [False, True])
def test_torchs_function_is_what_runs(rms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "rms_norm" if rms else "layer_norm"
    real, asked = getattr(F, name), []
    monkeypatch.setattr(F, name, lambda *given: asked.append(given) or real(*given))
    x, weight = torch.randn(3, 8), torch.randn(8)
    y = getattr(fused_attn, name)(x, (8,), weight, eps=1e-3, backend=NAME)
    assert len(asked) == 1
    assert torch.equal(y, real(x, (8,), weight, eps=1e-3))


def test_a_large_row_is_as_torch_has_it_and_float16_is_right() -> None:
    """Squares of float16's numbers fit into float32; those of larger ones do not."""
    x = torch.tensor([[1e20, 2e20, 3e20, -1e20]])
    assert torch.equal(
        fused_attn.layer_norm(x, (4,), backend=NAME).isnan(), F.layer_norm(x, (4,)).isnan()
    )
    for size in (65504.0, 2.0**-14):
        x = (torch.rand(3, 64) * size).half()
        y = fused_attn.layer_norm(x, (64,), eps=0.0, backend=NAME)
        expected = fused_attn.layer_norm(x.double(), (64,), eps=0.0, backend="reference")
        torch.testing.assert_close(y.double(), expected, rtol=4e-3, atol=4e-3)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    y = fused_attn.layer_norm(x, (8,), backend=NAME)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("rms", [False, True])
def test_double_backward_is_right(rms: bool) -> None:
    x, residual, weight = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in ((2, 5),) * 2 + ((5,),)
    )
    add = fused_attn.add_rms_norm if rms else fused_attn.add_layer_norm

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return add(x, residual, (5,), weight, return_sum=True, backend=NAME)

    assert torch.autograd.gradcheck(run, (x, residual, weight))
    assert torch.autograd.gradgradcheck(run, (x, residual, weight))


def test_in_place_and_out() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    expected = fused_attn.add_layer_norm(x, residual, (8,), weight, return_sum=True)
    stream, out = residual.clone(), torch.empty(3, 16)[:, ::2]
    y, h = fused_attn.add_layer_norm(
        x, stream, (8,), weight, return_sum=True, sum_out=stream, out=out, backend=NAME
    )
    assert y is out
    assert h is stream
    torch.testing.assert_close((y, h), expected)
    assert fused_attn.layer_norm(x, (8,), out=x, backend=NAME) is x


def test_it_compiles() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return fused_attn.layer_norm(x, (8,), weight, backend=NAME)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


REFUSED: dict[str, Any] = {
    "dropout": (lambda x: fused_attn.add_layer_norm(x, x, (8,), dropout_p=0.1, backend=NAME),
                "has no kernels for `dropout_rng`"),
    "wider weight": (
        lambda x: fused_attn.layer_norm(x.half(), (8,), torch.ones(8), backend=NAME),
        "takes `weight` in torch.float16 only, got torch.float32"),
    "vmap": (lambda x: torch.func.vmap(
        lambda row: fused_attn.layer_norm(row, (8,), backend=NAME))(x), "leaves transforms"),
    "forward mode": (lambda x: torch.func.jvp(
        lambda x: fused_attn.layer_norm(x, (8,), backend=NAME), (x,), (x,)), "forward-mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_express_is_a_reason(name: str) -> None:
    run, reason = REFUSED[name]
    with pytest.raises(fused_attn.UnsupportedError, match=reason):
        run(torch.randn(3, 8))


def test_forward_mode_finds_the_formula() -> None:
    x = torch.randn(3, 8)
    _, pushed = torch.func.jvp(lambda x: fused_attn.layer_norm(x, (8,)), (x,), (x.cos(),))
    _, expected = torch.func.jvp(lambda x: F.layer_norm(x, (8,)), (x,), (x.cos(),))
    torch.testing.assert_close(pushed, expected)


def test_a_gpu_gets_it_where_ours_may_not_and_a_cpu_by_name_alone() -> None:
    problem = call.smallest(torch.device("cpu"), torch.float32)
    assert torch_functions.only_by_name(problem) == "our own kernels are faster here"
    on_gpu = dataclasses.replace(problem, device=torch.device("cuda:0"))
    assert torch_functions.only_by_name(on_gpu) is None
    assert fused_attn.explain(fused_attn.layer_norm, torch.ones(2, 8), (8,)).chosen != NAME
    assert [backend.NAME for backend in BACKENDS][-2:] == [NAME, "reference"]
