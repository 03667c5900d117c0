"""Operators of torch's for an operation, defined once for all of its fused backends.

Eager calls go straight to the backend. Whoever traces (torch.compile, export, fake tensors, a
dispatch mode) sees operators instead: the same arguments, the same code behind them. An operator
costs some microseconds a call, and has to be flat: `define` takes the named tuples of a call apart
and puts them together again.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from ..runtime import higher_order, profiling
from . import dispatch
from .dispatch import OPERATOR, Route

Results = Sequence[Tensor | None]

# The words of operator schemas. Integers may be symbolic: sizes are.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[bool, ...]: "bool[]",
}

_library = torch.library.Library("fused_attn", "FRAGMENT")


def define(
    name: str,
    groups: Sequence[type[Any]],
    results: Sequence[str],
    real: Callable[..., Results],
    fake: Callable[..., Results],
    formula: Callable[..., Results] | None = None,
) -> None:
    """Define the operator `fused_attn::name`.

    Args:
        groups: named tuples; the operator's arguments are their fields, one after the other.
        results: names of the tensors that it returns.
        real, fake: take one argument for each group and return the results; the fake one their
            shapes and dtypes only. An operator returns tensors, so an empty one stands for None.
        formula: likewise, in operators of torch's: for those who can run no others (ONNX).
    """
    arguments = [
        f"{_SCHEMA_TYPES[kind]} {field}"
        for group in groups
        for field, kind in get_type_hints(group).items()
    ]
    returned = ", ".join(f"Tensor {result}" for result in results)
    _library.define(f"{name}({', '.join(arguments)}) -> ({returned})")

    def flat(function: Callable[..., Results]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            tensors = _as_tensors(function(*_grouped(args, groups)), args[0])
            return tensors if len(results) > 1 else tensors[0]

        return call

    for device in ("CPU", "CUDA"):
        _library.impl(name, flat(real), device)
    offer = None
    if formula is not None:
        operator = getattr(torch.ops.fused_attn, name).default
        offer = functools.partial(_offer, operator, flat(_without_dropout(name, formula)))
        offer(offered=not _in_ci())
    stand_in = flat(fake)

    def traced(*args: Any) -> Any:
        if offer is not None and _in_ci():
            exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
            offer(offered=exporting and not _in_aot_inductor())
        return stand_in(*args)

    torch.library.register_fake(f"fused_attn::{name}", traced, lib=_library)


def _in_ci() -> bool:
    """As inductor asks: there it refuses to compile an operator that has a decomposition."""
    return bool(os.environ.get("CI"))


def _in_aot_inductor() -> bool:
    """True where inductor compiles an exported program."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and bool(virtualized.V.aot_compilation)


def _offer(operator: Any, formula: Callable[..., Any], *, offered: bool) -> None:
    """Where `offered`, torch knows the formula of `operator`: ONNX has no such operator."""
    known = torch._decomp.decomposition_table
    if not offered:
        known.pop(operator, None)
    elif operator not in known:
        register_decomposition(operator)(formula)


def _without_dropout(name: str, formula: Callable[..., Results]) -> Callable[..., Results]:
    """`formula`, but for dropout, whose random numbers are integers that ONNX cannot compute."""

    def run(operands: Any, *rest: Any) -> Results:
        rng = getattr(operands, "dropout_rng", None)
        if rng is not None and torch.onnx.is_in_onnx_export():
            raise dispatch.UnsupportedError(
                f"fused_attn::{name} with dropout has no translation into ONNX; hint: call "
                "`model.eval()` before the export, or pass dropout_p=0, or export the modules of "
                "torch.nn after `fused_attn.unfuse(model)`"
            )
        return formula(operands, *rest)

    return run


def differentiate(
    name: str,
    groups: Sequence[type[Any]],
    save: Callable[..., None],
    gradients: Callable[..., Mapping[str, Tensor | None]],
) -> None:
    """Give the operator `fused_attn::name` an autograd rule, for those who trace.

    Eager calls have an `autograd.Function` of their own, which is faster and has a forward-mode
    rule as well; the compiler takes no Function that has one.

    Args:
        groups: as of `define`.
        save: (ctx, *groups, results): keeps what the backward wants.
        gradients: (ctx, *gradients of the results): by name of the operand; None for no gradient.
    """
    fields = [field for group in groups for field in group._fields]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.by_operator = True
        save(ctx, *_grouped(inputs, groups), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, *grads)
        return tuple(found.get(field) for field in fields)

    torch.library.register_autograd(
        f"fused_attn::{name}", backward, setup_context=setup, lib=_library
    )


def _grouped(args: tuple[Any, ...], groups: Sequence[type[Any]]) -> list[Any]:
    """An operator's flat arguments, put together again."""
    found, start = [], 0
    for group in groups:
        end = start + len(group._fields)
        found.append(group(*args[start:end]))
        start = end
    return found


def _as_tensors(results: Results, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in results)


def by_operator(ctx: Any) -> bool:
    """True where a backward must go through the operator, as its forward did or as somebody traces.

    What a forward kept may be of a subclass that only an operator may look into, be the gradient
    that comes in as plain as it likes (results of torch's functional collectives are such).
    """
    return getattr(ctx, "by_operator", False) or dispatch.is_traced()


def only(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """An operator's results with None in the place of those that nobody asked for."""
    return [x if want else None for x, want in zip(tensors, wanted, strict=True)]


class Settings(NamedTuple):
    """Of whom a call is wanted."""

    backend: str


class Backward(NamedTuple):
    """What the backward of a recomputing operation takes besides the operands."""

    dy: Tensor
    needs: tuple[bool, ...]  # of the differentiable operands


def recomputing(
    name: str,
    package: str,
    operands: type[Any],
    options: type[Any],
    differentiable: Sequence[str],
    empty_result: Callable[[Any, Any], Tensor],
    formula: Callable[[Any, Any], Tensor],
) -> Callable[..., Tensor]:
    """Operators and autograd rule of an operation whose backward needs nothing but its operands.

    Its backends have `forward(operands, options, y)` and `backward(operands, options, dy, *grads)`
    with a tensor to write to, or None, for each differentiable operand.

    Args:
        name: of the operation; the operators are `name_forward` and `name_backward`.
        package: of the operation; its BACKENDS are asked for at the first call.
        operands, options: the named tuples of a call.
        differentiable: the operands that have gradients.
        empty_result: makes y, not yet written.
        formula: the reference.

    Returns:
        `run(operands, options, backend, needs_grad, route, out=None)`, which returns y. `backend`
        is a name, `route` KERNEL or OPERATOR, `out` the tensor to write y to where no gradient is
        wanted.
    """
    places = [operands._fields.index(field) for field in differentiable]
    count = len(operands._fields)

    def run_forward(given: Any, how: Any, backend: str, out: Tensor | None = None) -> Tensor:
        y = empty_result(given, how) if out is None else out
        dispatch.named(package, backend).forward(given, how, y)
        return y

    def empty_gradients(given: Any, needs: Sequence[bool]) -> list[Tensor | None]:
        inputs = [given[place] for place in places]
        return [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
            for x, need in zip(inputs, needs, strict=True)
        ]

    def run_backward(given: Any, how: Any, backend: str, dy: Tensor, needs: Any) -> Results:
        grads = empty_gradients(given, needs)
        dispatch.named(package, backend).backward(given, how, dy, *grads)
        return grads

    define(
        f"{name}_forward",
        (operands, options, Settings),
        ("y",),
        lambda given, how, settings: [run_forward(given, how, *settings)],
        lambda given, how, settings: [empty_result(given, how)],
        lambda given, how, settings: [formula(given, how)],
    )
    define(
        f"{name}_backward",
        (operands, options, Settings, Backward),
        [f"d{field}" for field in differentiable],
        lambda given, how, settings, rest: run_backward(given, how, *settings, *rest),
        lambda given, how, settings, rest: empty_gradients(given, rest.needs),
    )

    def save(ctx: Any, given: Any, how: Any, settings: Settings, y: Tensor) -> None:
        ctx.save_for_backward(*given)
        ctx.options, ctx.backend = how, settings.backend

    def gradients(ctx: Any, dy: Tensor | None) -> Mapping[str, Tensor | None]:
        if dy is None:
            return {}
        given, how = operands(*ctx.saved_tensors), ctx.options
        needs = tuple(ctx.needs_input_grad[place] for place in places)
        found: Results
        if higher_order.backward_needs_formula((dy,)):
            inputs = [given[place] for place in places]
            found = higher_order.gradients_through(formula_of(given, how), inputs, (dy,))
        elif not by_operator(ctx):
            rest = (given, how, ctx.backend, dy, needs)
            found = profiling.call(f"{name}_backward", ctx.backend, run_backward, *rest)
        else:
            operator = getattr(torch.ops.fused_attn, f"{name}_backward")
            found = only(operator(*given, *how, ctx.backend, dy, needs), needs)
        return dict(zip(differentiable, found, strict=True))

    differentiate(f"{name}_forward", (operands, options, Settings), save, gradients)

    def formula_of(given: Any, how: Any) -> higher_order.Formula:
        """The reference as a function of the differentiable operands."""

        def function(*inputs: Tensor | None) -> Sequence[Tensor]:
            return (formula(given._replace(**dict(zip(differentiable, inputs, strict=True))), how),)

        return function

    class Rule(torch.autograd.Function):
        """The operands one by one, then everything else."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            given, (how, backend) = operands(*args[:count]), args[count:]
            y = run_forward(given, how, backend)
            save(ctx, given, how, Settings(backend), y)
            ctx.save_for_forward(*given)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            found = gradients(ctx, dy)
            return (*(found.get(field) for field in operands._fields), None, None)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
            given = operands(*ctx.saved_tensors)
            inputs = [given[place] for place in places]
            moved = [tangents[place] for place in places]
            return higher_order.tangents_through(formula_of(given, ctx.options), inputs, moved)[0]

    def run(
        given: Any,
        how: Any,
        backend: str,
        needs_grad: bool,
        route: Route,
        out: Tensor | None = None,
    ) -> Tensor:
        if route is OPERATOR:
            return getattr(torch.ops.fused_attn, f"{name}_forward")(*given, *how, backend)
        if needs_grad:
            return Rule.apply(*given, how, backend)
        return run_forward(given, how, backend, out)

    return run
