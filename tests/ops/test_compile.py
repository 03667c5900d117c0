"""Operators and the compiler: opcheck, fullgraph compile with static and dynamic shapes, export."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fused_attn import attention, attention_varlen, bias_activation, embedding, layer_norm
from fused_attn.ops.attention import BACKENDS, call, reference
from fused_attn.ops.attention.fused import _empty_gradients
from fused_attn.ops.attention.problem import Operands
from fused_attn.runtime import native
from tests.cases.attention import Case

FUSED = [backend.NAME for backend in BACKENDS if backend is not reference]

CASES = {
    "plain": Case(seqlen_q=20, seqlen_k=30),
    "everything": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=20, seqlen_k=30, causal="lower_right",
        window=(9, 9), padding="mask", mask="b1qk", bias="1hqk", alibi=True, softcap=5.0,
        dropout_p=0.1, layout="blhd",
    ),
    "weights": Case(weights="average", num_heads=4),
    "positions": Case(
        seqlen_q=20, seqlen_k=30, causal=True, window=(9, 0), documents="runs", prefix=True, chunk=8
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend: str, name: str) -> None:
    case = CASES[name]
    operands = Operands(**case.tensors(torch.float32, requires_grad=False))
    problem = call.problem_of(operands, case.scalars())
    if reasons := next(b for b in BACKENDS if backend == b.NAME).why_not(problem):
        pytest.skip("; ".join(reasons))
    head = (*operands, *problem.options)
    forward = torch.ops.fused_attn.attention_forward.default
    for layout in ("bhld", "blhd"):
        torch.library.opcheck(forward, (*head, problem.weights, True, layout, backend))
    out, lse, weights = forward(*head, problem.weights, True, "bhld", backend)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dweights = torch.randn_like(weights) if problem.weights else None
    backward = torch.ops.fused_attn.attention_backward.default
    for needs in ([True] * 4, [False, True, False, False]):
        tail = (problem.weights, True, "bhld", backend, out, lse, dout, dlse, dweights, needs)
        torch.library.opcheck(backward, (*head, *tail))


def block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor, backend: str) -> Tensor:
    out, lse = attention(
        q, k, v, causal=True, bias=bias, key_padding_mask=padding, return_lse=True,
        backend=backend,
    )  # fmt: skip
    return out.square().sum() + lse.sin().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile_agrees_with_eager(attention_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((2, 20), (2, 33), (3, 40)):
        q, k, v = (torch.randn(batch, 2, length, 8, requires_grad=True) for _ in range(3))
        bias = torch.randn(2, length, length, requires_grad=True)
        padding = torch.ones(batch, length, dtype=torch.bool)
        padding[:, length - 5 :] = False
        results = []
        for function in (block, compiled):
            value = function(q, k, v, bias, padding, attention_backend)
            results.append((value, *torch.autograd.grad(value, (q, k, v, bias))))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_fullgraph_compile_by_inductor_with_dropout_and_weights(attention_backend: str) -> None:
    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = attention(
            q, k, v, dropout_p=0.2, dropout_rng=rng, return_weights="average",
            backend=attention_backend,
        )  # fmt: skip
        return out * 2, weights

    q, k, v = (torch.randn(2, 2, 20, 8) for _ in range(3))
    rng = torch.tensor([3, 4])
    expected = run(q, k, v, rng)
    for actual, wanted in zip(
        torch.compile(run, fullgraph=True)(q, k, v, rng), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_compiled_dropout_draws_anew_at_each_call(attention_backend: str) -> None:
    torch._dynamo.reset()

    def run(q: Tensor) -> Tensor:
        return attention(q, q, q, dropout_p=0.5, backend=attention_backend)

    q = torch.randn(1, 1, 30, 8)
    run(q)  # refused here where the backend has no dropout
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(q), compiled(q))


def test_fullgraph_compile_of_packed_sequences(attention_backend: str) -> None:
    torch._dynamo.reset()

    def run(q: Tensor, starts: Tensor) -> Tensor:
        return attention_varlen(q, q, q, starts, starts, 9, 9, causal=True,
                                backend=attention_backend)  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((4, 9), (9, 1), (2, 3)):
        starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        q = torch.randn(sum(lengths), 2, 4)
        expected = run(q, starts)
        torch.testing.assert_close(compiled(q, starts), expected)


CALLS = {
    "attention": lambda x: attention(x, x, x, causal=True),
    "layer_norm": lambda x: layer_norm(x, (8,)),
    "bias_activation": lambda x: bias_activation(x, x[0, 0, 0], activation="gelu"),
    "embedding": lambda x: embedding(torch.zeros(2, 3, dtype=torch.int64), x[0, 0]),
}


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_runs_the_operator_and_not_the_formula(name: str, training: bool) -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    x = torch.randn(1, 2, 6, 8, requires_grad=training)
    result = torch.compile(CALLS[name], fullgraph=True, backend=backend)(x)
    assert f"fused_attn.{name}_forward.default" in seen
    if training:
        result.sum().backward()
        assert f"fused_attn.{name}_backward.default" in seen


def test_export_with_dynamic_batch_and_length(attention_backend: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True, backend=attention_backend)

    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shape = {0: batch, 2: length}
    sample = tuple(torch.randn(3, 2, 10, 8) for _ in range(3))
    program = torch.export.export(Model(), sample, dynamic_shapes=(shape, shape, shape))
    other = tuple(torch.randn(5, 2, 17, 8) for _ in range(3))
    torch.testing.assert_close(program.module()(*other), Model()(*other))


def test_meta_and_fake_tensors(attention_backend: str) -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 3, 10, 8)
        out, lse = attention(q, q, q, return_lse=True, backend=attention_backend)
        assert out.shape == (2, 3, 10, 8)
        assert lse.shape == (2, 3, 10)


def test_gradient_buffers_come_in_the_layout_of_their_tensors() -> None:
    operands = Operands(**Case(layout="blhd").tensors(torch.float32))
    gradients = _empty_gradients(operands, (True, True, True, False))
    assert gradients[3] is None
    for gradient, tensor in zip(gradients[:3], operands[:3], strict=True):
        assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize("order", ["compile", "export"])
def test_ci_compiles_and_exports(order: str) -> None:
    """With CI in the environment inductor refuses operators that have a decomposition."""
    program = f"""
import torch, fused_attn
linear = torch.nn.Linear(8, 8)
def run(x):
    return fused_attn.layer_norm(linear(x), (8,))
class Model(torch.nn.Module):
    def forward(self, x):
        return run(x)
x = torch.randn(3, 8)
def compile():
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run)(x), run(x))
def export():
    exported = torch.export.export(Model(), (x,))
    names = {{str(node.target) for node in exported.run_decompositions(
        torch._decomp.decomposition_table).graph.nodes}}
    assert not any("fused_attn" in name for name in names), names
for action in ({order}, export, compile, export):
    action()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "CI": "true"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
