"""Running random calls: judge, make small, and say how to repeat."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._version import __version__
from ...ops import dispatch
from ...ops.dispatch import UnsupportedError
from ...ops.operations import OPERATIONS as REGISTRY
from ..budget import DRAWS, check_against_oracle
from . import attention, bias_activation, embedding, layer_norm, linear, modules
from .built import Built
from .fields import Case, Fields, draw, expect, shrink
from .tensors import guarded_like, is_untouched

MODULES, FUSED = "modules", "fused"
MANY = 12  # times as often as usual
_DRAWN = {x.__name__.rpartition(".")[2]: x for x in
          (attention, layer_norm, bias_activation, embedding, linear)}  # fmt: skip
OPERATIONS = (*(operation.name for operation in REGISTRY), MODULES)


class Failure(NamedTuple):
    """A call that is wrong.

    Attributes:
        case: made as small as it stays wrong.
        message: what is wrong with it.
        repeat: the command that runs it again.
    """

    case: Case
    message: str
    repeat: str


def fields_of(op: str) -> Fields:
    """What a case of an operation is made of.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in OPERATIONS:
        raise ValueError(f"`op` must be one of {', '.join(OPERATIONS)}, got {op!r}")
    return modules.FIELDS if op == MODULES else _DRAWN[op].FIELDS


def backends_of(op: str, all_of_them: bool = True) -> tuple[str, ...]:
    """Names of those that a call can be run by.

    Args:
        all_of_them: those of torch's own functions too, whose errors are torch's.
    """
    for operation in REGISTRY:
        if operation.name == op:
            return tuple(
                backend.NAME
                for backend in operation.backends
                if all_of_them or not _is_torch(backend, operation.operands)
            )
    return (FUSED,)


def _is_torch(backend: Any, operands: Any) -> bool:
    return dispatch.is_formula(backend) and backend.OPERANDS < set(operands._fields)


def why_not(op: str, backend: str, device: str = "cpu") -> str | None:
    """Why a backend cannot run anything here; None if it can."""
    for operation in REGISTRY:
        for each in operation.backends:
            if operation.name == op and backend == each.NAME:
                problem = operation.smallest(torch.device(device), torch.float32)
                reasons = dispatch.why_not(each, problem)
                return "; ".join(reasons) or None
    if op == MODULES and backend == FUSED:
        return None
    known = ", ".join(backends_of(op))
    raise ValueError(f"`backend` must be one of {known} for {op}, got {backend!r}")


def check(op: str, backend: str, case: Case, device: str = "cpu") -> bool:
    """Run one case; False if the backend does not serve such a call.

    Plain PyTorch's error is the yardstick, and in a small call it is partly luck: before a call is
    called wrong, it is looked at many times more.

    Raises:
        AssertionError: a result, a gradient, or memory beside a result is not what it should be.
        ValueError: the case is of another version.
    """
    case = expect(case, fields_of(op))
    try:
        return _check(op, backend, case, device, DRAWS)
    except AssertionError:
        return _check(op, backend, case, device, MANY * DRAWS)


def _check(op: str, backend: str, case: Case, device: str, draws: int) -> bool:
    if op == MODULES:
        modules.check(case, draws)
        return True
    built = _DRAWN[op].build(case, device)
    try:
        check_against_oracle(
            lambda **tensors: built.call(tensors, backend),
            lambda **tensors: built.call(tensors, "reference"),
            built.tensors,
            built.outputs,
            built.noise,
            draws,
        )
        with torch.no_grad():
            results = built.call(built.tensors, backend)
    except UnsupportedError:
        return False
    if built.takes_out and case["out"]:
        _check_out(built, backend, results[0])
    return True


def _check_out(built: Built, backend: str, expected: Tensor) -> None:
    """The same numbers come through `out`, and nothing beside it is written."""
    inside, around = guarded_like(expected)
    with torch.no_grad():
        built.call(built.tensors, backend, out=inside)
    assert is_untouched(around, inside), "memory beside `out` was written"
    same = torch.equal(inside.nan_to_num(), expected.nan_to_num())
    assert same, "`out` differs from the result without it"


def fuzz(
    op: str,
    backend: str,
    cases: int,
    seed: int = 0,
    device: str = "cpu",
    tell: Callable[[], Any] | None = None,
    failures: int = 5,
) -> tuple[int, int, list[Failure]]:
    """Try the cases of the seeds [seed, seed + cases).

    Args:
        tell: called after each.
        failures: stop after so many.

    Returns:
        How many were tried, how many of them the backend does not serve, and what is wrong.
    """
    refused, tried, found = 0, 0, []
    for case in _cases(op, cases, seed):
        tried += 1
        try:
            refused += not check(op, backend, case, device)
        except Exception as error:  # whatever it is, it is the finding
            found.append(_small(op, backend, case, device, error))
        if tell is not None:
            tell()
        if len(found) == failures:
            break
    return tried, refused, found


def _cases(op: str, cases: int, seed: int) -> Iterator[Case]:
    fields = fields_of(op)
    for n in range(seed, seed + cases):
        yield draw(fields, n)


def _small(op: str, backend: str, case: Case, device: str, error: Exception) -> Failure:
    """The failure, of the simplest case that fails in the same way."""
    last = error

    def fails(smaller: Case) -> bool:
        nonlocal last
        try:
            check(op, backend, smaller, device)
        except type(error) as again:
            last = again
            return True
        except Exception:
            return False
        return False

    small = shrink(case, fields_of(op), fails)
    message = f"{type(last).__name__}: {last}"
    return Failure(small, message, repeat_line(op, backend, small, device))


def repeat_line(op: str, backend: str, case: Case, device: str = "cpu") -> str:
    """The command that runs a case again, with this version."""
    text = shlex.quote(json.dumps(case, separators=(",", ":")))
    return (
        f"python -m fused_attn.testing fuzz --op {op} --backend {backend} --device {device} "
        f"--version {__version__} --repeat {text}"
    )
