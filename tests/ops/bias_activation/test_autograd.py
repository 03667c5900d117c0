"""Bias + activation: derivatives of every order and kind, operators, compiler."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_attn import bias_activation
from fused_attn.ops import dispatch
from fused_attn.ops.bias_activation import BACKENDS, call
from fused_attn.ops.bias_activation.problem import Operands
from tests.cases.bias_activation import Case

CASES = {
    "relu": Case("relu", (3, 5)),
    "gelu": Case("gelu", (2, 2, 3)),
    "tanh gelu": Case("gelu_tanh", (3, 5)),
    "silu": Case("silu", (3, 5), bias=False),
    "swiglu": Case("silu", (3, 5), gated=True),
    "dropout": Case("gelu", (3, 5), dropout_p=0.4),
    "geglu dropout": Case("gelu", (3, 5), gated=True, dropout_p=0.4),
}

FUSED = [backend.NAME for backend in BACKENDS if not dispatch.is_formula(backend)]


def as_function(case: Case, backend: str):
    """The case in float64 as a function of its tensors, and these tensors."""
    tensors = {
        name: tensor.detach().double().requires_grad_() for name, tensor in case.tensors().items()
    }

    def function(*values: Tensor) -> Tensor:
        return case.run(backend, **dict(zip(tensors, values, strict=True)))

    return function, tuple(tensors.values())


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(bias_activation_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], bias_activation_backend)
    assert gradcheck(
        function, values, check_forward_ad=True, check_batched_grad=True, fast_mode=False
    )


def test_gradients_to_differentiate_again_are_the_same_gradients(
    bias_activation_backend: str,
) -> None:
    """The bias may have been computed from x: that history is not part of the operation."""
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = bias_activation(x, x.sum(0), activation="gelu", backend=bias_activation_backend)
    vector = torch.randn_like(y)
    grads = [
        torch.autograd.grad(y, x, vector, create_graph=create_graph)[0]
        for create_graph in (True, False)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(bias_activation_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], bias_activation_backend)
    assert gradgradcheck(function, values)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_alone(bias_activation_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], bias_activation_backend)
    everything = torch.autograd.grad(function(*values).sin().sum(), values)
    for i, expected in enumerate(everything):
        alone = [v if i == j else v.detach() for j, v in enumerate(values)]
        [grad] = torch.autograd.grad(function(*alone).sin().sum(), [values[i]])
        torch.testing.assert_close(grad, expected)


def test_torch_func_transforms(bias_activation_backend: str) -> None:
    x, bias = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    run = functools.partial(
        bias_activation, bias=bias, activation="silu", gated=True, backend=bias_activation_backend
    )
    seen = functools.partial(run, backend=None)  # by the formula
    torch.testing.assert_close(torch.func.vmap(seen)(x), run(x))
    per_sample = torch.func.vmap(torch.func.grad(lambda x: seen(x).sin().sum()))(x)
    moving = x.clone().requires_grad_()
    [expected] = torch.autograd.grad(run(moving).sin().sum(), moving)
    torch.testing.assert_close(per_sample, expected)


def test_only_x_and_bias_are_kept(bias_activation_backend: str) -> None:
    if bias_activation_backend not in FUSED:
        pytest.skip("autograd keeps what the plain formula needs")
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    x, bias = (torch.randn(s, requires_grad=True) for s in ((6, 50), (50,)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        bias_activation(x, bias, activation="gelu", backend=bias_activation_backend)
    assert kept == [x.data_ptr(), bias.data_ptr()]


def test_checkpointing_gives_the_same_gradients(bias_activation_backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(20, 40, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return bias_activation(x, activation="gelu", dropout_p=0.3, backend=bias_activation_backend)

    results = []
    for call_it in (run, functools.partial(checkpoint, run, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(call_it(x).sin().sum(), x)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend: str, name: str) -> None:
    case = CASES[name]
    rng = torch.tensor([1, 2]) if case.dropout_p else None
    operands = Operands(**case.tensors(requires_grad=False), dropout_rng=rng)
    scalars = call.Scalars(case.activation, case.gated, case.dropout_p)
    problem = call.problem_of(operands, scalars)
    if reasons := next(b for b in BACKENDS if backend == b.NAME).why_not(problem):
        pytest.skip("; ".join(reasons))
    arguments = (*operands, *problem.options, backend)
    forward = torch.ops.fused_attn.bias_activation_forward.default
    torch.library.opcheck(forward, arguments)
    dy = torch.randn_like(forward(*arguments))
    backward = torch.ops.fused_attn.bias_activation_backward.default
    for needs in ([True, case.bias], [True, False], [False, case.bias]):
        torch.library.opcheck(backward, (*arguments, dy, needs))


def block(x: Tensor, bias: Tensor, backend: str) -> Tensor:
    y = bias_activation(x, bias, activation="silu", gated=True, backend=backend)
    return bias_activation(y, activation="gelu", backend=backend).square().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile_agrees_with_eager(bias_activation_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    bias = torch.randn(24, requires_grad=True)
    for batch, length in ((2, 5), (2, 7), (3, 4)):
        x = torch.randn(batch, length, 24, requires_grad=True)
        results = []
        for function in (block, compiled):
            value = function(x, bias, bias_activation_backend)
            results.append((value, *torch.autograd.grad(value, (x, bias))))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_fullgraph_compile_by_inductor_with_dropout(bias_activation_backend: str) -> None:
    torch._dynamo.reset()

    def run(x: Tensor, rng: Tensor) -> Tensor:
        return bias_activation(
            x, activation="relu", dropout_p=0.3, dropout_rng=rng, backend=bias_activation_backend
        )

    x, rng = torch.randn(5, 24), torch.tensor([3, 4])
    expected = run(x, rng)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x, rng), expected)


def test_meta_and_fake_tensors(bias_activation_backend: str) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 8)
        y = bias_activation(x, activation="silu", gated=True, backend=bias_activation_backend)
        assert y.shape == (2, 3, 4)
