"""torch's own embedding as a backend: what it can express is right, the rest it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.embedding import BACKENDS, call, torch_functions
from fused_attn.ops.embedding.problem import Operands
from tests.cases.embedding import Case

NAME = torch_functions.NAME
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = {
    "no table": Case(table=None),
    "counted": Case(offset=2),
    "given": Case(table="given"),
    "padding": Case(padding_idx=3, num_tokens=5),
    "strides": Case(strides="every other"),
    "no tokens": Case(shape=(2, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(CASES[name], dtype=dtype)
    scalars = call.Scalars(case.scale, case.offset, case.padding_idx)
    problem = call.problem_of(Operands(**case.tensors()), scalars)
    assert dispatch.why_not(torch_functions, problem) == []
    case.check(NAME)


def test_rows_are_gathered_before_anything_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole vocabulary, as the formula does."""
    real, asked = F.embedding, []
    monkeypatch.setattr(F, "embedding", lambda *given: asked.append(given) or real(*given))
    tokens, weight, table = torch.tensor([2, 0]), torch.randn(3, 8).half(), torch.randn(4, 8).half()
    y = fused_attn.embedding(tokens, weight, table, scale=2.0, offset=1, backend=NAME)
    [(_, gathered, padding)] = asked
    assert gathered is weight
    assert padding is None
    expected = (weight[tokens].float() * 2.0 + table[1:3].float()).half()
    assert torch.equal(y, expected), "rounded once"


def test_a_wider_table_gives_the_promoted_type() -> None:
    tokens, weight, table = torch.tensor([2, 0]), torch.randn(3, 8).half(), torch.randn(4, 8)
    y = fused_attn.embedding(tokens, weight, table, scale=3.0, backend=NAME)
    assert torch.equal(y, torch.add(table[:2], weight[tokens].float(), alpha=3.0))


def test_double_backward_is_right() -> None:
    weight, table = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tokens = torch.tensor([[2, 0, 2]])

    def run(weight: Tensor, table: Tensor) -> Tensor:
        return fused_attn.embedding(tokens, weight, table, scale=2.0, backend=NAME).sin()

    assert torch.autograd.gradcheck(run, (weight, table))
    assert torch.autograd.gradgradcheck(run, (weight, table))


def test_the_result_is_new() -> None:
    weight = torch.randn(3, 4)
    y = fused_attn.embedding(torch.tensor([1]), weight, backend=NAME)
    assert y.data_ptr() != weight[1].data_ptr()
    assert torch.equal(y[0], weight[1])


def test_tokens_out_of_range_are_an_index_error() -> None:
    with pytest.raises(IndexError):
        fused_attn.embedding(torch.tensor([3]), torch.randn(3, 4), backend=NAME)


def test_it_compiles() -> None:
    torch._dynamo.reset()
    tokens, weight = torch.tensor([[2, 0]]), torch.randn(3, 8, requires_grad=True)

    def run(weight: Tensor) -> Tensor:
        return fused_attn.embedding(tokens, weight, scale=2.0, backend=NAME)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), run(weight))


def test_what_it_cannot_express_is_a_reason() -> None:
    tokens, weight = torch.tensor([1]), torch.randn(3, 4)
    with pytest.raises(fused_attn.UnsupportedError, match="has no kernels for `dropout_rng`"):
        fused_attn.embedding(tokens, weight, dropout_p=0.1, backend=NAME)
    with pytest.raises(fused_attn.UnsupportedError, match="leaves transforms"):
        torch.func.grad(lambda w: fused_attn.embedding(tokens, w, backend=NAME).sum())(weight)


def test_a_gpu_gets_it_and_a_cpu_by_name_alone() -> None:
    problem = call.smallest(torch.device("cpu"), torch.float32)
    assert torch_functions.only_by_name(problem) == "our own kernels are faster here"
    on_gpu = dataclasses.replace(problem, device=torch.device("cuda:0"))
    assert torch_functions.only_by_name(on_gpu) is None
    told = fused_attn.explain(fused_attn.embedding, torch.tensor([0]), torch.ones(2, 8))
    assert told.chosen != NAME
    assert [backend.NAME for backend in BACKENDS][-2:] == [NAME, "reference"]
