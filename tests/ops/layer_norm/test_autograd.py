"""The norms: derivatives of every order and kind, operators, compiler."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fused_attn import add_layer_norm, layer_norm
from fused_attn.ops import dispatch
from fused_attn.ops.layer_norm import BACKENDS, call
from fused_attn.ops.layer_norm.problem import Operands
from tests.cases.layer_norm import Case, finest_dtype, served_dtypes

CASES = {
    "norm": Case((3, 5)),
    "rms": Case((2, 2, 3), 2, rms=True),
    "no parameters": Case((3, 5), weight=False, bias=False),
    "post": Case((3, 5), residual="post"),
    "pre": Case((3, 5), residual="pre"),
    "pre dropout": Case((3, 5), residual="pre", dropout_p=0.4),
    "post rms dropout": Case((3, 5), residual="post", dropout_p=0.4, rms=True),
}

FUSED = [backend.NAME for backend in BACKENDS if not dispatch.is_formula(backend)]


def as_function(case: Case, backend: str, dtype: torch.dtype = torch.float64):
    """The case in `dtype` as a function of its tensors, and these tensors."""
    if dtype not in served_dtypes(backend):
        pytest.skip(f"{backend} does not serve {dtype}")
    tensors = {
        name: tensor.detach().to(dtype).requires_grad_() for name, tensor in case.tensors().items()
    }

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return case.run(backend, **dict(zip(tensors, values, strict=True)))

    return function, tuple(tensors.values())


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(layer_norm_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], layer_norm_backend)
    assert gradcheck(
        function, values, check_forward_ad=True, check_batched_grad=True, fast_mode=False
    )


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(layer_norm_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], layer_norm_backend)
    assert gradgradcheck(function, values)


def test_gradients_to_differentiate_again_are_the_same_gradients(layer_norm_backend: str) -> None:
    """x may have been computed from the residual: its own history is not part of the norm."""
    residual = torch.randn(4, 9, dtype=finest_dtype(layer_norm_backend), requires_grad=True)
    for return_sum in (False, True):
        results = add_layer_norm(
            residual.sin(), residual, 9, return_sum=return_sum, backend=layer_norm_backend
        )
        y = results[0] * results[1] if return_sum else results
        grads = [
            torch.autograd.grad(y, residual, torch.ones_like(y), create_graph=create_graph)[0]
            for create_graph in (True, False)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_alone(layer_norm_backend: str, name: str) -> None:
    """Any subset of gradients may be wanted, and any subset of outputs used."""
    dtype = finest_dtype(layer_norm_backend)
    function, values = as_function(CASES[name], layer_norm_backend, dtype)
    expected_function, _ = as_function(CASES[name], "reference", dtype)
    for index in range(len(function(*values))):
        everything = torch.autograd.grad(
            expected_function(*values)[index].sin().sum(), values, materialize_grads=True
        )
        for i, expected in enumerate(everything):
            alone = [v if i == j else v.detach() for j, v in enumerate(values)]
            output = function(*alone)[index].sin().sum()
            if not output.requires_grad:
                continue
            [grad] = torch.autograd.grad(output, [values[i]], materialize_grads=True)
            torch.testing.assert_close(grad, expected)


def test_forward_mode_agrees_with_the_reference(layer_norm_backend: str) -> None:
    dtype = finest_dtype(layer_norm_backend)
    x, residual, tangent = (torch.randn(4, 9, dtype=dtype) for _ in range(3))

    def push(backend: str) -> list[Tensor]:
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(x, tangent)
            outputs = add_layer_norm(moving, residual, 9, return_sum=True, backend=backend)
            return [forward_ad.unpack_dual(output).tangent for output in outputs]

    for actual, expected in zip(push(layer_norm_backend), push("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_torch_func_transforms(layer_norm_backend: str) -> None:
    dtype = finest_dtype(layer_norm_backend)
    x, weight = torch.randn(3, 4, 9, dtype=dtype), torch.randn(9, dtype=dtype)
    run = functools.partial(
        layer_norm, normalized_shape=9, weight=weight, backend=layer_norm_backend
    )
    seen = functools.partial(layer_norm, normalized_shape=9, weight=weight)  # by the formula
    torch.testing.assert_close(torch.func.vmap(seen)(x), run(x))
    per_sample = torch.func.vmap(torch.func.grad(lambda x: seen(x).sin().sum()))(x)
    moving = x.clone().requires_grad_()
    expected = torch.autograd.grad(run(moving).sin().sum(), moving)[0]
    torch.testing.assert_close(per_sample, expected)


def test_the_sum_is_all_that_is_kept_of_x_and_residual(layer_norm_backend: str) -> None:
    if layer_norm_backend not in FUSED:
        pytest.skip("autograd keeps what the plain formula needs")
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((6, 50), (6, 50), (50,)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, total = add_layer_norm(
            x, residual, 50, weight, return_sum=True, backend=layer_norm_backend
        )
    pointers = [tensor.data_ptr() for tensor in kept]
    assert total.data_ptr() in pointers
    assert x.data_ptr() not in pointers
    assert residual.data_ptr() not in pointers


def test_checkpointing_gives_the_same_gradients(layer_norm_backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    x, residual = (torch.randn(20, 40, requires_grad=True) for _ in range(2))

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return add_layer_norm(x, residual, 40, dropout_p=0.3, backend=layer_norm_backend)

    results = []
    for call_it in (run, functools.partial(checkpoint, run, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(call_it(x, residual).sin().sum(), (x, residual)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend: str, name: str) -> None:
    case = CASES[name]
    tensors = case.tensors(requires_grad=False)
    rng = torch.tensor([1, 2]) if case.dropout_p else None
    operands = Operands(**tensors, dropout_rng=rng)
    need_sum = case.residual == "pre"
    scalars = call.Scalars(case.row, 1e-5, case.rms, case.dropout_p)
    problem = call.problem_of(operands, scalars)
    if reasons := next(b for b in BACKENDS if backend == b.NAME).why_not(problem):
        pytest.skip("; ".join(reasons))
    settings = (need_sum, True, backend)
    arguments = (*operands, *problem.options, *settings)
    forward = torch.ops.fused_attn.layer_norm_forward.default
    torch.library.opcheck(forward, arguments)
    y, h, mean, rstd = forward(*arguments)
    if need_sum:
        operands = operands._replace(x=h, residual=None)
    dh = torch.randn_like(y) if need_sum else None
    backward = torch.ops.fused_attn.layer_norm_backward.default
    for needs in ([True] * 4, [False, True, False, False], [True, False, True, False]):
        tail = (None if case.rms else mean, rstd, torch.randn_like(y), dh, y.dtype, y.dtype, needs)
        torch.library.opcheck(backward, (*operands, *problem.options, *settings, *tail))


def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    y, total = add_layer_norm(x, residual, 24, weight, bias, return_sum=True, backend=backend)
    z = add_layer_norm(y, total, 24, weight, backend=backend)
    return z.square().sum() + layer_norm(total, (24,), backend=backend).sin().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile_agrees_with_eager(layer_norm_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight, bias = (torch.randn(24, requires_grad=True) for _ in range(2))
    for batch, length in ((2, 5), (2, 7), (3, 4)):
        x, residual = (torch.randn(batch, length, 24, requires_grad=True) for _ in range(2))
        results = []
        for function in (block, compiled):
            value = function(x, residual, weight, bias, layer_norm_backend)
            results.append((value, *torch.autograd.grad(value, (x, residual, weight, bias))))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_fullgraph_compile_by_inductor_with_dropout(layer_norm_backend: str) -> None:
    torch._dynamo.reset()

    def run(x: Tensor, residual: Tensor, rng: Tensor) -> Tensor:
        return add_layer_norm(
            x, residual, 24, dropout_p=0.3, dropout_rng=rng, backend=layer_norm_backend
        )

    x, residual, rng = torch.randn(5, 24), torch.randn(5, 24), torch.tensor([3, 4])
    expected = run(x, residual, rng)
    actual = torch.compile(run, fullgraph=True)(x, residual, rng)
    torch.testing.assert_close(actual, expected)


def test_meta_and_fake_tensors(layer_norm_backend: str) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 8)
        y, total = add_layer_norm(x, x, 8, return_sum=True, backend=layer_norm_backend)
        assert y.shape == total.shape == (2, 3, 8)
