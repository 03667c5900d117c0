"""Who may be timed: a side's results against float64, by the error budget of the tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn.testing import (
    BACKWARD_FACTOR,
    DRAWS,
    FORWARD_FACTOR,
    assert_within_budget,
    neighbours,
    plain_error,
    to_dtype,
)

from .problem import Prepared, Problem, leaves, with_flags


@dataclass(frozen=True)
class Budget:
    """What a problem's output and gradients must be, and by how much they may differ."""

    names: list[str]
    oracle: list[Tensor]
    errors: list[float]
    stored: list[float]


class Judge:
    """Holds the sides of one problem against its oracle."""

    def __init__(self, problem: Problem) -> None:
        """Draws the inputs of `problem.checked()`."""
        self.problem = problem.checked()
        self.tensors = with_flags(self.problem, self.problem.tensors())

    def verdict(self, prepare: Callable[[dict[str, Tensor]], Prepared]) -> str | None:
        """What is wrong with the results of a side; None if they are right.

        Raises whatever the side raises.
        """
        inputs = with_flags(self.problem, {n: x.detach() for n, x in self.tensors.items()})
        prepared = prepare(inputs)
        if self.problem.operation == "import":
            prepared.forward()
            return None
        poison_freed_memory(prepared)
        with poisoned():
            results = self._results(prepared)
        try:
            for i, (name, result) in enumerate(zip(self.budget.names, results, strict=True)):
                budget = self.budget
                is_output = i < len(self.problem.outputs)
                factor = FORWARD_FACTOR if is_output else BACKWARD_FACTOR
                assert_within_budget(
                    name, result, budget.errors[i], budget.oracle[i], factor, budget.stored[i]
                )
        except AssertionError as error:
            return str(error)
        return None

    def _results(self, prepared: Prepared) -> list[Tensor]:
        found = prepared.forward()
        outputs = [found] if isinstance(found, Tensor) else list(found)
        names = self.problem.outputs
        results = [
            self.problem.part(name, prepared.restore(name, x.detach()))
            for name, x in zip(names, outputs[: len(names)], strict=True)
        ]
        if self.problem.wants_gradient:
            inputs = list(prepared.inputs.values())
            gradients = torch.autograd.grad(outputs[0], inputs, prepared.arrange(self.dout))
            for name, gradient in zip(prepared.inputs, gradients, strict=True):
                results.append(self.problem.part(name, prepared.restore(name, gradient)))
        return [x.clone() for x in results]

    @functools.cached_property
    def dout(self) -> Tensor:
        with torch.no_grad():
            out = self.problem.formula(**self._parts) if not self._cut else None
        if out is not None and out[0] is not None:
            return self.problem.output_gradient(out[0])
        return self.problem.output_gradient(self.tensors["q"])

    @functools.cached_property
    def _parts(self) -> dict[str, Tensor]:
        parts = {n: self.problem.part(n, x).detach() for n, x in self.tensors.items()}
        return with_flags(self.problem, parts)

    @property
    def _cut(self) -> bool:
        """Whether only a part of the problem is compared (attention: output shaped as q)."""
        return any(self._parts[name].shape != x.shape for name, x in self.tensors.items())

    @functools.cached_property
    def budget(self) -> Budget:
        problem, parts = self.problem, self._parts
        wanted = list(leaves(problem, parts))
        names = [*problem.outputs, *(f"gradient of {name}" for name in wanted)]
        oracle = self._evaluate(to_dtype(parts, torch.float64))
        errors = [0.0] * len(names)
        for draw in range(DRAWS):
            inputs = neighbours(to_dtype(parts, problem.dtype), draw) if draw else parts
            plain = self._evaluate(inputs)
            exact = self._evaluate(to_dtype(inputs, torch.float64))
            for i, (x, y) in enumerate(zip(plain, exact, strict=True)):
                errors[i] = max(errors[i], plain_error(x, y, problem.dtype))
        stored = None
        if wanted:
            doubles = to_dtype(parts, torch.float64)
            outputs = problem.formula(**doubles)
            stored = problem.noise(outputs, [doubles[name] for name in wanted])
        return Budget(names, oracle, errors, stored or [0.0] * len(names))

    def _evaluate(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Outputs and gradients of the formula on parts."""
        outputs = self.problem.formula(**tensors)[: len(self.problem.outputs)]
        found = [x.detach() for x in outputs if x is not None]
        wanted = list(leaves(self.problem, tensors).values())
        if not wanted or outputs[0] is None:
            return found
        dout = self.problem.part("out", self.dout).to(outputs[0].dtype)
        return [*found, *torch.autograd.grad(outputs[0], wanted, dout)]


def poison_freed_memory(prepared: Prepared) -> None:
    """Let the allocator hand out NaN: what a side does not write cannot pass for a result."""
    outputs = prepared.forward()
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    for x in outputs:
        if isinstance(x, Tensor) and not x.requires_grad and x.is_floating_point():
            x.fill_(float("nan"))
    shapes = [x.shape for x in (*outputs, *prepared.inputs.values()) if isinstance(x, Tensor)]
    like = next((x for x in outputs if isinstance(x, Tensor)), None)
    if like is None:
        return
    freed = [like.new_full(shape, float("nan")) for shape in shapes for _ in range(2)]
    del freed


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors that Python code leaves uninitialised start as NaN."""
    names = ("empty", "empty_like", "empty_strided")
    before: dict[str, Any] = {name: getattr(torch, name) for name in names}

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and type(tensor) is Tensor and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_filled

    for name, function in before.items():
        setattr(torch, name, filled(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def first_line(error: BaseException, length: int = 160) -> str:
    """An exception in one line of a table."""
    lines: Sequence[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:length].rstrip(": ")
