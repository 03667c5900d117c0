"""Derivatives of every order and kind, for every backend."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import attention
from fused_attn.ops import dispatch
from fused_attn.ops.attention import BACKENDS, cpu, fast_path
from fused_attn.runtime import native
from tests.cases.attention import Case, finest_dtype, run_backend, skip_unless_supported

CASES = {
    "plain": Case(1, 2, 2, 5, 7, 3),
    "causal, grouped": Case(1, 2, 1, 6, 6, 3, causal=True),
    "bias": Case(1, 2, 2, 4, 5, 3, bias="1hqk", softcap=3.0),
    "dropout": Case(1, 1, 1, 5, 6, 3, dropout_p=0.3),
    "empty rows": Case(2, 1, 1, 4, 4, 3, padding="empty"),
    "weights": Case(1, 2, 2, 4, 5, 3, weights="average"),
    "weights per head": Case(1, 2, 2, 4, 5, 3, weights="per_head", mask="b1qk", dropout_p=0.2),
}


def as_function(case: Case, backend: str):
    """The case as a function of its differentiable tensors alone, and these tensors."""
    tensors = case.tensors(torch.float64)
    skip_unless_supported(case, backend, tensors)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = run_backend(case, backend, **{**tensors, **dict(zip(names, values, strict=True))})
        # lse is -inf where a row is empty, which finite differences cannot take.
        return tuple(x.clamp(min=-1e3) for x in outputs if x is not None)

    return function, tuple(tensors[name] for name in names)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(attention_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], attention_backend)
    assert gradcheck(
        function, values, check_forward_ad=True, check_batched_grad=True, fast_mode=False
    )


def test_gradients_to_differentiate_again_are_the_same_gradients(attention_backend: str) -> None:
    """q, k and v mostly come from one tensor: that history is not part of the attention."""
    q = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    k = q.sin()
    out = attention(q, k, k.cos(), backend=attention_backend)
    vector = torch.randn_like(out)
    grads = [
        torch.autograd.grad(out, q, vector, create_graph=create_graph)[0]
        for create_graph in (True, False)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(attention_backend: str, name: str) -> None:
    function, values = as_function(CASES[name], attention_backend)
    assert gradgradcheck(function, values)


def test_forward_mode_agrees_with_the_reference(attention_backend: str) -> None:
    dtype = finest_dtype(attention_backend)
    q, k, v, tangent = (torch.randn(1, 2, 9, 4, dtype=dtype) for _ in range(4))

    def push(backend: str) -> Tensor:
        with forward_ad.dual_level():
            out = attention(q, k, forward_ad.make_dual(v, tangent), causal=True, backend=backend)
            return forward_ad.unpack_dual(out).tangent

    torch.testing.assert_close(push(attention_backend), push("reference"))


def test_torch_func_transforms(attention_backend: str) -> None:
    dtype = finest_dtype(attention_backend)
    q, k, v = (torch.randn(3, 1, 2, 9, 4, dtype=dtype) for _ in range(3))
    run = functools.partial(attention, causal=True, backend=attention_backend)
    expected = torch.stack([run(*x) for x in zip(q, k, v, strict=True)])
    seen = functools.partial(attention, causal=True)  # by the formula
    torch.testing.assert_close(torch.func.vmap(seen)(q, k, v), expected)

    def loss(function: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(functools.partial(loss, seen)))(q, k, v)
    x = q.clone().requires_grad_()
    total = sum(loss(run, *x) for x in zip(x, k, v, strict=True))
    torch.testing.assert_close(per_sample, torch.autograd.grad(total, x)[0])
    torch.func.jacrev(seen)(q[0], k[0], v[0])


def test_only_lse_is_differentiated(attention_backend: str) -> None:
    dtype = finest_dtype(attention_backend)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=dtype, requires_grad=True) for _ in range(3))

    def gradients(backend: str) -> tuple[Tensor, ...]:
        lse = attention(q, k, v, return_lse=True, backend=backend)[1]
        return torch.autograd.grad(lse.square().sum(), (q, k, v), materialize_grads=True)

    for actual, expected in zip(gradients(attention_backend), gradients("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradients_leave_frozen_tensors_alone(attention_backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=i == 0) for i in range(3))
    attention(q, k, v, backend=attention_backend).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is None


SMALL = {  # and whether the backward is to compute out and lse again
    "one head": ((1, 1, 1, 4, 7, 8), True),
    "tiny": ((1, 2, 2, 4, 4, 16), True),
    "grouped": ((2, 2, 1, 5, 6, 16), True),
    "more queries than the few": ((1, 1, 1, 20, 20, 16), True),
    "no keys": ((1, 2, 2, 4, 0, 8), True),
    "no batch": ((0, 2, 2, 4, 4, 8), True),
    "too many heads": ((1, 5, 5, 4, 4, 8), False),
    "too long": ((1, 1, 1, 40, 40, 8), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_small_cpu_backward_computes_out_and_lse_again(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what comes of those that a larger problem keeps."""
    if native.why_not() is not None:
        pytest.skip(native.why_not())
    (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim), again = SMALL[name]
    q = torch.randn(batch, heads, seqlen_q, head_dim, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(batch, heads_kv, seqlen_k, head_dim, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    vector = torch.randn_like(q)

    def run() -> tuple[int, tuple[Tensor, ...]]:
        dispatch.forget_plans()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.append(x), x)[1], lambda x: x
        ):
            out = attention(q, k, v, causal="lower_right", backend="cpu")
        return len(kept), (out, *torch.autograd.grad(out, (q, k, v), vector))

    kept, actual = run()
    monkeypatch.setattr(cpu, "computes_again", lambda problem: False)
    kept_otherwise, expected = run()
    dispatch.forget_plans()
    assert (kept, kept_otherwise) == (3 if again else 5, 5)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_small_backward_in_unusual_circumstances(attention_backend: str) -> None:
    """Watched, batched, to be differentiated again: there out and lse may be needed after all."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    skip_unless_supported(Case(1, 2, 2, 4, 4, 8), attention_backend, {"q": q, "k": k, "v": v})
    vectors = torch.randn(3, 1, 2, 4, 8)

    def grads(vector: Tensor, backend: str = attention_backend, **how: bool) -> tuple[Tensor, ...]:
        out = attention(q, k, v, backend=backend)
        return torch.autograd.grad(out, (q, k, v), vector, **how)

    expected = grads(vectors[0], "reference")

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
            return function(*args, **(kwargs or {}))

    out = attention(q, k, v, backend=attention_backend)
    with Watcher():
        watched = torch.autograd.grad(out, (q, k, v), vectors[0])
    again = grads(vectors[0], create_graph=True)
    batched = [x[0] for x in grads(vectors, is_grads_batched=True)]
    for found in (grads(vectors[0]), watched, again, batched):
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e)
    assert all(x.requires_grad for x in again)


def test_checkpointing_gives_the_same_gradients(attention_backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.3, backend=attention_backend)

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(q, k, v).sum(), (q, k, v))
    torch.manual_seed(3)
    actual = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).sum(), (q, k, v))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_a_tensor_that_a_transform_left_behind_is_a_tensor(attention_backend: str) -> None:
    kept = []
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8, requires_grad=True)
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(q)
    assert torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    skip_unless_supported(Case(1, 2, 2, 5, 5, 8), attention_backend, {"q": q, "k": k, "v": k})
    out, expected = (attention(x, k, k, backend=attention_backend) for x in (kept[0], q))
    assert torch.equal(out, expected)
    gradients = [torch.autograd.grad(x.sum(), k)[0] for x in (out, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("needs", [("q",), ("k", "v"), ("q", "k", "v")])
@pytest.mark.parametrize("shape", [(1, 2, 4, 16), (2, 3, 70, 8)])
def test_the_fast_path_and_the_plain_one_agree(
    attention_backend: str,
    shape: tuple[int, ...],
    needs: tuple[str, ...],
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another version of torch takes the plain one."""
    tensors = {name: torch.randn(shape, requires_grad=name in needs) for name in ("q", "k", "v")}
    dout = torch.randn(shape)
    results = []
    for is_tested in (True, False):
        monkeypatch.setattr(fast_path, "is_tested", is_tested)
        dispatch.forget_plans()
        out = attention(**tensors, causal=causal, backend=attention_backend)
        is_fast = "FastAttention" in type(out.grad_fn).__name__
        formula = dispatch.is_formula(dispatch.find(BACKENDS, attention_backend))
        assert is_fast == (is_tested and not formula)
        results.append((out, *torch.autograd.grad(out, [tensors[n] for n in needs], dout)))
    dispatch.forget_plans()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
