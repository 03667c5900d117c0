"""Choosing a backend: ask each one, in order, why it cannot run a problem; take the first that can.

A backend is a module of its operation's folder. It states its `NAME` and answers `why_not(problem)`
with a list of reasons; an empty list means yes. The folder's ordered `BACKENDS` tuple is at once
the registration and the policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


class Backend(Protocol):
    """What every backend module of every operation provides; the operation adds its functions."""

    NAME: str

    def why_not(self, problem: Any) -> list[str]:
        """Reasons why `problem` cannot run here; empty if it can."""
        ...


BackendT = TypeVar("BackendT", bound=Backend)


class UnsupportedError(NotImplementedError):
    """No backend (or not the one asked for by name) can run a problem; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem, and why the ones before it do not.

    Attributes:
        problem: the description of the call.
        chosen: name of the backend that runs it, or None.
        reasons: (backend name, its reasons) in order of preference; no reasons means that it can.
    """

    problem: Any
    chosen: str | None
    reasons: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reasons in self.reasons:
            if name == self.chosen:
                verdict = "runs this"
            else:
                verdict = "; ".join(reasons) if reasons else "could run this, a better one is there"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines)


def find(backends: Sequence[BackendT], name: str) -> BackendT:
    """The backend called `name`.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    for backend in backends:
        if name == backend.NAME:
            return backend
    known = ", ".join(repr(backend.NAME) for backend in backends)
    raise ValueError(f"`backend` must be one of {known}, got {name!r}")


def select(backends: Sequence[BackendT], problem: Any, name: str | None = None) -> BackendT:
    """First backend of `backends` that can run `problem`, or the one called `name` and no other.

    Raises:
        ValueError: no backend is called `name`.
        UnsupportedError: the backends asked cannot run `problem`.
    """
    candidates: Iterable[BackendT] = backends if name is None else (find(backends, name),)
    refusals = []
    for backend in candidates:
        reasons = backend.why_not(problem)
        if not reasons:
            return backend
        refusals.append((backend.NAME, reasons))
    lines = [f"no backend can run {problem}"]
    lines += [f"  {backend}: {reason}" for backend, reasons in refusals for reason in reasons]
    raise UnsupportedError("\n".join(lines))


def explain(backends: Sequence[BackendT], problem: Any, name: str | None = None) -> Explanation:
    """What `select` would do with `problem`, and every backend's reasons; runs nothing."""
    reasons = tuple((backend.NAME, tuple(backend.why_not(problem))) for backend in backends)
    able = [backend for backend, why in reasons if not why and name in (None, backend)]
    if name is not None:
        find(backends, name)
    return Explanation(problem, able[0] if able else None, reasons)
