"""What a peer is: a name, why it is not here, what it cannot do, and how it is called."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..operations.importing import import_call
from ..problem import Prepared, Problem

MARK = "†"
PrepareOf = Callable[[Any, dict[str, Tensor]], Prepared]


def _nothing_missing() -> str | None:
    return None


def _no_limits(problem: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation.

    Attributes:
        operations: how a `Prepared` is made of a problem and its tensors, by operation.
        missing: why it is not on this machine; None if it is.
        limits: what it has against a problem of one of its operations.
        compiles: it compiles for seconds a problem on the CPU, so that quick runs leave it out.
        package: what an import-time measurement imports.
        reuses_memory: operations whose result it writes into memory that was made before, where
            ours makes it anew: a report marks that.
    """

    name: str
    operations: Mapping[str, PrepareOf]
    missing: Callable[[], str | None] = _nothing_missing
    limits: Callable[[Any], list[str]] = _no_limits
    compiles: bool = False
    package: str | None = None
    reuses_memory: frozenset[str] = frozenset()

    def serves(self, operation: str) -> bool:
        return operation in self.operations or (operation == "import" and self.package is not None)

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why it cannot take `problem`; empty if it can."""
        return [] if problem.operation == "import" else self.limits(problem)

    def prepare(self, problem: Problem, tensors: dict[str, Tensor]) -> Prepared:
        if problem.operation == "import" and self.package is not None:
            return import_call(self.package)
        return self.operations[problem.operation](problem, tensors)


@functools.cache
def import_error(module: str, distribution: str) -> str | None:
    """Why `module` cannot be imported, in words for a table; None if it can."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    except ValueError:  # a module put into sys.modules by hand has no spec
        found = True
    if not found:
        return f"{distribution} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # built against another torch or CUDA, say
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{distribution} fails to import: {first[:120]}"
    return None


def needs_gpu(problem: Problem) -> list[str]:
    return [] if problem.device == "cuda" else ["needs an NVIDIA GPU"]
