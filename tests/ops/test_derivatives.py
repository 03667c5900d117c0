"""Every float operand of every operation has a gradient, whoever takes it: none is dropped.

The operands are those of the `OPERATIONS` registry: one that has no example here fails the test.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.operations import OPERATIONS, Operation

F64 = torch.float64


def attention_call(x: dict[str, Tensor], **how: Any) -> Tensor:
    ids = (x.get("query_documents"), x.get("key_documents"))
    x = {name: tensor for name, tensor in x.items() if "_documents" not in name}
    document_ids = None if ids[0] is None else ids
    return fused_attn.attention(**x, causal=True, document_ids=document_ids, **how)


def packed_call(x: dict[str, Tensor], **how: Any) -> Tensor:
    return fused_attn.attention_varlen(**x, max_seqlen_q=4, max_seqlen_k=4, **how)


def norm_call(x: dict[str, Tensor], **how: Any) -> Tensor:
    how = {"dropout_p": 0.3, "normalized_shape": (6,), **how}
    return fused_attn.add_layer_norm(**x, **how)


def activation_call(x: dict[str, Tensor], **how: Any) -> Tensor:
    how = {"dropout_p": 0.3, **how}
    return fused_attn.bias_activation(**x, activation="silu", gated=True, **how)


def linear_call(x: dict[str, Tensor], **how: Any) -> Tensor:
    return fused_attn.linear(**x, **{"activation": "silu", "dropout_p": 0.3, **how})


def embedding_call(x: dict[str, Tensor], **how: Any) -> Tensor:
    return fused_attn.embedding(**x, **{"scale": 2.0, "dropout_p": 0.3, **how})


RNG = torch.tensor([5, 7])

# Calls with all operands, by the names that the public functions give them.
CALLS: dict[str, list[tuple[Any, dict[str, Tensor]]]] = {
    "attention": [
        (
            functools.partial(attention_call, dropout_p=0.3),
            {
                **{n: torch.randn(2, 4, 5, 8, dtype=F64) for n in ("q", "k", "v")},
                "bias": torch.randn(4, 5, 5, dtype=F64),
                "mask": torch.rand(2, 1, 5, 5) < 0.8,
                "key_padding_mask": torch.tensor([[True] * 5, [True, True, False, True, True]]),
                "key_lengths": torch.tensor([5, 4]),
                "alibi_slopes": torch.rand(4),
                "sinks": torch.randn(4, dtype=F64),
                "dropout_rng": RNG,
            },
        ),
        (
            attention_call,
            {
                **{n: torch.randn(2, 4, 5, 8, dtype=F64) for n in ("q", "k", "v")},
                "query_documents": torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 3, 3]]),
                "key_documents": torch.tensor([[0, 1, 1, 0, 1], [3, 3, 4, 3, 3]]),
                "prefix_lengths": torch.tensor([2, 4]),
            },
        ),
        (
            packed_call,
            {
                **{n: torch.randn(7, 4, 8, dtype=F64) for n in ("q", "k", "v")},
                "cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
                "cu_seqlens_k": torch.tensor([0, 4, 7], dtype=torch.int32),
                "alibi_slopes": torch.rand(4),
                "sinks": torch.randn(4, dtype=F64),
            },
        ),
    ],
    "layer_norm": [
        (
            norm_call,
            {
                **{n: torch.randn(3, 6, dtype=F64) for n in ("x", "residual")},
                **{n: torch.randn(6, dtype=F64) for n in ("weight", "bias")},
                "dropout_rng": RNG,
            },
        )
    ],
    "bias_activation": [
        (
            activation_call,
            {
                "x": torch.randn(3, 8, dtype=F64),
                "bias": torch.randn(8, dtype=F64),
                "dropout_rng": RNG,
            },
        )
    ],
    "linear": [
        (
            linear_call,
            {
                "x": torch.randn(3, 5, 6, dtype=F64),
                "weight": torch.randn(4, 6, dtype=F64),
                "bias": torch.randn(4, dtype=F64),
                "residual": torch.randn(3, 5, 4, dtype=F64),
                "dropout_rng": RNG,
            },
        )
    ],
    "embedding": [
        (
            embedding_call,
            {
                "tokens": torch.tensor([[1, 2, 1], [0, 3, 3]]),
                "weight": torch.randn(5, 6, dtype=F64),
                "table": torch.randn(4, 6, dtype=F64),
                "positions": torch.tensor([[0, 1, 2], [2, 2, 3]]),
                "dropout_rng": RNG,
            },
        )
    ],
}
EXAMPLES = [
    pytest.param(call, tensors, name, id=f"{operation}-{number}-{name}")
    for operation, calls in CALLS.items()
    for number, (call, tensors) in enumerate(calls)
    for name, tensor in tensors.items()
    if tensor.is_floating_point()
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operand_has_an_example(operation: Operation) -> None:
    shown = {name for _, tensors in CALLS[operation.name] for name in tensors}
    assert set(operation.operands._fields) == shown


def numerical(call: Any, tensors: dict[str, Tensor], name: str, along: Tensor) -> Tensor:
    """Derivative of sum(sin(call)) along a direction, by central differences in float64."""
    step = 1e-6 if tensors[name].dtype == F64 else 1e-3
    ends = []
    for sign in (1, -1):
        moved = {**tensors, name: tensors[name] + sign * step * along}
        ends.append(call(moved, backend="reference").sin().sum())
    return (ends[0] - ends[1]) / (2 * step)


def moving(call: Any, tensors: dict[str, Tensor], name: str, x: Tensor, **how: Any) -> Tensor:
    return call({**tensors, name: x}, **how).sin().sum()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("call", "tensors", "name"), EXAMPLES)
def test_the_gradient_is_the_derivative(
    call: Any, tensors: dict[str, Tensor], name: str, alone: bool
) -> None:
    """Whether that operand alone wants a gradient, or all of them."""
    wanted = {n: x.clone().requires_grad_(alone is False or n == name)
              if x.is_floating_point() else x for n, x in tensors.items()}  # fmt: skip
    along = torch.randn_like(tensors[name])
    [grad] = torch.autograd.grad(call(wanted).sin().sum(), [wanted[name]])
    expected = numerical(call, tensors, name, along)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if grad.dtype == F64 else {"rtol": 3e-3, "atol": 1e-3}
    torch.testing.assert_close((grad * along).sum().to(F64), expected, **tolerance)


@pytest.mark.parametrize(("call", "tensors", "name"), EXAMPLES)
def test_transforms_and_the_compiler_agree(
    call: Any, tensors: dict[str, Tensor], name: str
) -> None:
    run = functools.partial(moving, call, tensors, name)
    x = tensors[name].clone().requires_grad_()
    [expected] = torch.autograd.grad(run(x), [x])
    along = torch.randn_like(x)
    torch.testing.assert_close(torch.func.grad(run)(x.detach()), expected)
    _, tangent = torch.func.jvp(run, (x.detach(),), (along,))
    torch.testing.assert_close(tangent.to(x.dtype), (expected * along).sum())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), along)
        moved = forward_ad.unpack_dual(run(dual)).tangent
    torch.testing.assert_close(moved, tangent)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    [found] = torch.autograd.grad(compiled(x), [x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("call", "tensors", "name"), EXAMPLES)
def test_a_backend_has_the_gradient_or_says_that_it_has_not(
    call: Any, tensors: dict[str, Tensor], name: str
) -> None:
    single = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    x = single[name].clone().requires_grad_()
    [operation] = [o for o in OPERATIONS if any(tensors is t for _, t in CALLS[o.name])]
    for backend in operation.backends:
        if dispatch.why_not(backend, operation.smallest(torch.device("cpu"), torch.float32)):
            continue
        around = {"sinks"} if call is packed_call else {"sinks", "alibi_slopes"}
        if name not in backend.GRADIENTS and name not in around:
            with pytest.raises(fused_attn.UnsupportedError, match=f"has no .* `{name}`"):
                moving(call, single, name, x, backend=backend.NAME)
            continue
        served, how = served_by(backend, operation, single)
        if len(served) < len(single):
            with pytest.raises(fused_attn.UnsupportedError, match="has no kernels for"):
                moving(call, single, name, x, backend=backend.NAME)
        if name not in served or (call is packed_call and "cu_seqlens_q" not in served):
            continue
        found, expected = (
            torch.autograd.grad(moving(call, served, name, x, backend=b, **how), [x])[0]
            for b in (backend.NAME, "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def served_by(
    backend: Any, operation: Operation, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What of `tensors` a backend of torch's functions takes, and the call's options with it."""
    if not dispatch.is_formula(backend):
        return tensors, {}
    optional = operation.operands._field_defaults.keys() - backend.OPERANDS
    served = {n: x for n, x in tensors.items() if n not in optional}
    refused = "dropout_rng" in tensors and "dropout_rng" not in served
    return served, {"dropout_p": 0.0} if refused else {}
