"""The embedding operation, for every backend."""

from __future__ import annotations

import pytest
import torch

from fused_attn import UnsupportedError, embedding
from fused_attn.ops import dispatch
from fused_attn.ops.embedding import BACKENDS, call, reference
from fused_attn.ops.embedding.problem import Operands
from tests.cases.embedding import RNG, Case, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

VARIANTS = {
    "no table": {"table": None},
    "counted": {"offset": 2},
    "given": {"table": "given"},
    "padding": {"padding_idx": 3, "num_tokens": 5},
    "dropout": {"dropout_p": 0.3, "table": "given"},
    "strides": {"strides": "every other"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_oracle(embedding_backend: str, dtype: torch.dtype, variant: str) -> None:
    for shape, width in (((7,), 1), ((3, 5), 17), ((2, 3, 4), 64), ((70, 7), 130)):
        Case(shape=shape, width=width, dtype=dtype, **VARIANTS[variant]).check(embedding_backend)


def test_fuzz(embedding_backend: str, fuzz_seed: int) -> None:
    random_case(fuzz_seed).check(embedding_backend)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_promote_as_an_addition_does(
    embedding_backend: str, dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    case = Case(dtype=dtype, table_dtype=table_dtype)
    tensors = case.tensors()
    [y], [expected] = case.run(embedding_backend, **tensors), case.plain(**tensors)
    assert y.dtype == expected.dtype
    wanted = [tensors["weight"], tensors["table"]]
    grads = torch.autograd.grad(y.sum(), wanted)
    assert [g.dtype for g in grads] == [dtype, table_dtype]
    for actual, exact in zip(grads, torch.autograd.grad(expected.sum(), wanted), strict=True):
        torch.testing.assert_close(actual, exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty(embedding_backend: str, shape: tuple[int, ...]) -> None:
    case = Case(shape=shape)
    tensors = case.tensors()
    [y] = case.run(embedding_backend, **tensors)
    assert y.shape == (*shape, case.width)
    y.sum().backward()
    for name in ("weight", "table"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name]))


def test_dropout_is_the_norms(embedding_backend: str) -> None:
    from fused_attn import add_layer_norm

    rng = torch.tensor(RNG)
    tokens = torch.zeros(37, dtype=torch.int64)
    for width, p in ((1, 0.1), (131, 0.9), (64, 1.0)):
        y = embedding(
            tokens, torch.ones(1, width), dropout_p=p, dropout_rng=rng, backend=embedding_backend
        )
        x = torch.ones(37, width)
        _, total = add_layer_norm(
            x, torch.zeros_like(x), width, dropout_p=p, dropout_rng=rng, return_sum=True
        )
        torch.testing.assert_close(y, total, rtol=1e-6, atol=0)


def test_dropout_follows_the_generator(embedding_backend: str) -> None:
    weight, tokens = torch.ones(1, 500), torch.zeros(40, dtype=torch.int64)

    def draw() -> torch.Tensor:
        return embedding(tokens, weight, dropout_p=0.25, backend=embedding_backend)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
    assert abs(float((first != 0).float().mean()) - 0.75) < 0.02


def test_results_repeat_bit_by_bit_on_any_number_of_threads(embedding_backend: str) -> None:
    if embedding_backend == reference.NAME:
        pytest.skip("torch's own order of additions depends on the number of threads")
    case = Case(shape=(40, 90), num_tokens=300, num_positions=90, width=77, dropout_p=0.1)
    tensors = case.tensors()
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        [y] = case.run(embedding_backend, **tensors)
        wanted = [tensors["weight"], tensors["table"]]
        results.append((y, *torch.autograd.grad(y.sin().sum(), wanted)))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_large_outputs_are_complete(embedding_backend: str) -> None:
    """Beyond 8 MB the CPU kernels write past the caches."""
    for width in (1024, 1023):
        case = Case(shape=(3, 800), num_tokens=50, num_positions=800, width=width)
        tensors = case.tensors(requires_grad=False)
        torch.testing.assert_close(case.run(embedding_backend, **tensors), case.plain(**tensors))


@pytest.mark.parametrize("where", ["tokens", "positions"])
@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_index_out_of_range_raises_as_torch(embedding_backend: str, where: str, wrong: int) -> None:
    tensors = Case(num_tokens=9, table="given").tensors()
    tensors[where][1, 2] = wrong
    with pytest.raises(IndexError):
        Case(table="given").run(embedding_backend, **tensors)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_derivatives_of_second_order_and_forward_mode(
    embedding_backend: str, padding_idx: int | None
) -> None:
    case = Case(
        shape=(2, 3), num_tokens=4, num_positions=3, width=3, dtype=torch.float64,
        dropout_p=0.3, padding_idx=padding_idx,
    )  # fmt: skip
    tensors = case.tensors()
    tokens = tensors.pop("tokens")

    def function(weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        [y] = case.run(embedding_backend, weight=weight.sin(), table=table.sin(), tokens=tokens)
        return y

    # A padding row's gradient is 0 by decree, so finite differences must not move it.
    if padding_idx is None:
        assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))
        assert torch.autograd.gradcheck(function, tuple(tensors.values()), check_forward_ad=True)
    [y] = case.run(embedding_backend, **tensors, tokens=tokens)
    (dweight,) = torch.autograd.grad(y.square().sum(), tensors["weight"], create_graph=True)
    (second,) = torch.autograd.grad(dweight.sum(), tensors["weight"])
    (plain,) = case.plain(**tensors, tokens=tokens)
    (expected,) = torch.autograd.grad(plain.square().sum(), tensors["weight"], create_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), tensors["weight"])
    torch.testing.assert_close(second, wanted)


@pytest.mark.parametrize("backend", [b.NAME for b in BACKENDS if not dispatch.is_formula(b)])
@pytest.mark.parametrize("table", [None, "counted", "given"])
def test_opcheck(backend: str, table: str | None) -> None:
    case = Case(table=table, dropout_p=0.2)
    operands = Operands(**case.tensors(requires_grad=False), dropout_rng=torch.tensor(RNG))
    scalars = call.Scalars(case.scale, 0, 1, case.dropout_p)
    problem = call.problem_of(operands, scalars)
    if reasons := next(b for b in BACKENDS if backend == b.NAME).why_not(problem):
        pytest.skip("; ".join(reasons))
    arguments = (*operands, *problem.options, backend)
    torch.library.opcheck(torch.ops.fused_attn.embedding_forward.default, arguments)
    dy = torch.randn(problem.shape)
    for needs in ([True, table is not None], [False, False]):
        backward = torch.ops.fused_attn.embedding_backward.default
        torch.library.opcheck(backward, (*arguments, dy, needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile_agrees_with_eager(embedding_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    weight, table = torch.randn(9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)

    def run(tokens: torch.Tensor, offset: int) -> torch.Tensor:
        return embedding(
            tokens, weight, table, scale=2.0, offset=offset, padding_idx=0,
            backend=embedding_backend,
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape, offset in (((2, 5), 0), ((3, 7), 4), ((1, 9), 5)):
        tokens = torch.randint(9, shape)
        results = [
            (y, *torch.autograd.grad(y.sin().sum(), (weight, table)))
            for y in (run(tokens, offset), compiled(tokens, offset))
        ]
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


MISTAKES = {
    "tokens type": ({"tokens": [1]}, TypeError, "`tokens` must be a tensor, got list"),
    "tokens dtype": ({"tokens": torch.zeros(2, 3)}, TypeError, "`tokens` must be torch.int64"),
    "tokens rank": ({"tokens": torch.tensor(1)}, ValueError, "`tokens` must have at least 1 dim"),
    "weight rank": ({"weight": torch.zeros(3)}, ValueError, "`weight` must have 2 dimensions"),
    "weight dtype": ({"weight": torch.zeros(3, 8).int()}, TypeError, "`weight` must be"),
    "table width": ({"table": torch.zeros(4, 7)}, ValueError, "`table` must have rows of 8"),
    "table rows": ({"offset": 2}, ValueError, r"each of the 5 positions .*got 4"),
    "offset": ({"offset": -1}, ValueError, "`offset` must be at least 0, got -1"),
    "offset type": ({"offset": 1.0}, TypeError, "`offset` must be an int, got float"),
    "positions": ({"positions": torch.zeros(3, dtype=torch.int64)}, ValueError, "`positions`"),
    "positions alone": (
        {"positions": torch.zeros(2, 3, dtype=torch.int64), "table": None},
        ValueError,
        "`positions` must be None where there is no `table`",
    ),
    "both": (
        {"positions": torch.zeros(2, 3, dtype=torch.int64), "offset": 1},
        ValueError,
        "`offset` must be 0 beside `positions`, got 1",
    ),
    "padding": ({"padding_idx": 5}, ValueError, r"`padding_idx` must be in \[-5, 5\), got 5"),
    "dropout": ({"dropout_p": 2}, ValueError, r"`dropout_p` must be in \[0, 1\]"),
    "scale": ({"scale": float("inf")}, ValueError, "`scale` must be finite"),
    "device": ({"table": torch.zeros(4, 8, device="meta")}, ValueError, "`table` must be on cpu"),
    "backend": ({"backend": "cdua"}, ValueError, "`backend` must be one of .* got 'cdua'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    changes, kind, message = MISTAKES[name]
    arguments = {
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "weight": torch.randn(5, 8),
        "table": torch.randn(4, 8),
    }
    with pytest.raises(kind, match=message):
        embedding(**(arguments | changes))


def test_meta_tensors_run_and_a_backend_asked_for_refuses() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    weight = torch.zeros(5, 8, device="meta")
    assert embedding(tokens, weight).is_meta
    with pytest.raises(UnsupportedError, match="needs tensors on the CPU, these are on meta"):
        embedding(tokens, weight, backend="cpu")
