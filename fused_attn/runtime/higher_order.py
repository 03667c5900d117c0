"""Derivatives that no kernel computes, taken through an operation's reference formula.

A fused backward is a kernel, so autograd cannot differentiate it. When somebody asks for more (a
double backward, a forward-mode derivative), these run the plain formula on the same inputs and
let autograd do the work: slower, never silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Formula = Callable[..., Sequence[Tensor | None]]


def gradients_through(
    formula: Formula, inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `formula(*inputs)`; where grad mode is on, themselves differentiable."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of the inputs, because one input may have been computed from another: a gradient
        # that went on to the inputs themselves would run through that history as well.
        points = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        outputs = formula(*points)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grad_outputs, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    wanted = [x for x in points if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    grads = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=again,
            allow_unused=True,
        )
    )
    return [next(grads) if x is not None and x.requires_grad else None for x in points]


def tangents_through(
    formula: Formula, inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Forward-mode derivative of `formula` at `inputs` along `tangents`.

    A gradient is linear in the vector that it is pulled back with, so its own gradient with respect
    to that vector is the forward derivative ("double backward trick", Townsend 2017).
    """
    moving = [i for i, t in enumerate(tangents) if t is not None and inputs[i] is not None]
    with torch.enable_grad():
        points = [
            None if x is None else x.detach().requires_grad_(i in moving)
            for i, x in enumerate(inputs)
        ]
        moved = [x for x in points if x is not None and x.requires_grad]
        outputs = formula(*points)
        result: list[Tensor | None] = []
        for output in outputs:
            if output is None or not output.requires_grad:
                result.append(None if output is None else torch.zeros_like(output))
                continue
            dummy = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, moved, dummy, create_graph=True, allow_unused=True)
            used = [i for i, g in zip(moving, pulled, strict=True) if g is not None]
            pushed = torch.autograd.grad(
                [g for g in pulled if g is not None],
                dummy,
                [t for i in used if (t := tangents[i]) is not None],
                retain_graph=True,
            )
            result.append(pushed[0].detach())
    return result


def forward_mode() -> bool:
    """True where a forward-mode derivative is being taken."""
    return forward_ad._current_level >= 0


def derivative_wanted(tensors: Iterable[Any]) -> bool:
    """True if a backward pass may follow, or a forward-mode derivative is being taken."""
    if forward_mode():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:  # not any(): a generator costs as much as the rest
            if getattr(tensor, "requires_grad", False):
                return True
    return False


def wanted_of(operands: Any) -> tuple[str, ...]:
    """Names of the operands (fields of a named tuple) of which a derivative is wanted."""
    grad = torch.is_grad_enabled()
    forward = forward_mode()
    return tuple(
        name
        for name, x in zip(operands._fields, operands, strict=True)
        if isinstance(x, Tensor) and ((grad and x.requires_grad) or (forward and _has_tangent(x)))
    )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def backward_needs_formula(grad_outputs: Iterable[Tensor | None]) -> bool:
    """True where a backward must go through the formula, and not a kernel.

    That is where its result is to be differentiated again, and where each of `grad_outputs` stands
    for many (`torch.autograd.grad(..., is_grads_batched=True)`, `torch.func.vmap` of a backward).
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(
        [grad is not None and _is_batched(grad) for grad in grad_outputs]
    )


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def needs_formula() -> bool:
    """True where somebody must see the formula itself, and not a kernel.

    That is inside torch.func transforms (grad, vmap, jvp, ...), which differentiate what they see,
    and under torch.jit.trace, whose graphs could not differentiate an operator.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


# Dynamo's own stand-in for the stack is an object that is never None: it would find a transform in
# every compiled function. The answer holds while a graph is traced, and Dynamo guards the stack.
needs_formula._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_alive(tensor: Tensor) -> bool:
    """False for a wrapper that a torch.func transform, done by now, left behind."""
    return torch._C._functorch.unwrap_if_dead(tensor) is tensor
