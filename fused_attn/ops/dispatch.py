"""Choosing a backend: ask each one, in order, why it cannot run a problem; take the first that can.

A backend is a module of its operation's folder. It states its `NAME`, the `OPERANDS` that it serves
and those that it has `GRADIENTS` of, and answers `why_not(problem)` with a list of reasons; an
empty list means yes. The folder's ordered `BACKENDS` tuple is at once the registration and the
policy.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..runtime import higher_order, hints, native, subclasses, verified
from .explanation import BY_NAME, Explanation


class Backend(Protocol):
    """What every backend module of every operation provides; the operation adds its functions.

    A backend that should not be taken unless it is asked for by name, though it could run, says why
    by an optional function `only_by_name(problem) -> str | None`. One whose kernels have been seen
    to be slower than torch's own functions says so by `slower(problem) -> str | None`: it then
    leaves to them what they can express.
    """

    NAME: str
    OPERANDS: frozenset[str]  # optional operands that its kernels take
    GRADIENTS: frozenset[str]  # operands, optional or not, that its backward has gradients of

    def why_not(self, problem: Any) -> list[str]:
        """Reasons why `problem` cannot run here; empty if it can."""
        ...


class Problem(Protocol):
    """What the choice needs of every operation's problem."""

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the optional operands that the call brings."""
        ...

    @property
    def gradients(self) -> tuple[str, ...]:
        """Names of the operands of which a derivative is wanted."""
        ...


def why_not(backend: Backend, problem: Problem) -> list[str]:
    """Every reason why `backend` cannot run `problem`: what it lacks, then what it says itself.

    A new operand is thereby refused by all backends that do not name it yet.
    """
    unknown = [name for name in problem.operands if name not in backend.OPERANDS]
    without = [name for name in problem.gradients if name not in backend.GRADIENTS]
    hidden = None if is_formula(backend) else _hidden()
    return (
        ([] if hidden is None else [hidden])
        + [f"has no kernels for `{name}`" for name in unknown]
        + [f"has no gradient of `{name}`" for name in without if name not in unknown]
        + backend.why_not(problem)
    )


def is_formula(backend: Backend) -> bool:
    """True for a backend that is ordinary torch code, which everyone can look into."""
    return getattr(backend, "IS_FORMULA", False)


def is_torchs(backend: Backend) -> bool:
    """True for a backend of torch's own functions: a formula that expresses a part of the calls."""
    return getattr(backend, "IS_TORCH", False)


def _hidden() -> str | None:
    """Why no kernel can run whatever the call: somebody must see the formula itself."""
    if higher_order.needs_formula():
        return "cannot be looked into by torch.func's transforms and torch.jit.trace"
    if higher_order.forward_mode() and is_traced():
        return "has no forward-mode derivative where operators are traced or watched"
    return None


BackendT = TypeVar("BackendT", bound=Backend)


class Described:
    """What the descriptions of all operations' calls have."""

    gradients: tuple[str, ...]  # names of the operands of which a derivative is wanted

    @property
    def requires_grad(self) -> bool:
        """A backward pass may follow, or a forward-mode derivative is being taken."""
        return bool(self.gradients)


class UnsupportedError(NotImplementedError):
    """No backend (or not the one asked for by name) can run a problem; the message says why."""


def find(backends: Sequence[BackendT], name: str) -> BackendT:
    """The backend called `name`.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    for backend in backends:
        if name == backend.NAME:
            return backend
    names = [backend.NAME for backend in backends]
    close = hints.closest(str(name), names)
    message = f"`backend` must be one of {', '.join(map(repr, names))}, got {name!r}"
    raise ValueError(hints.with_hint(message, f"`backend={close!r}`" if close else None))


@functools.cache
def named(package: str, name: str) -> Any:
    """The backend called `name` of the operation in `package`.

    Looked up at a call, not at import: the operation's tuple imports the backends, and those the
    modules that ask.
    """
    return find(importlib.import_module(package).BACKENDS, name)


def select(backends: Sequence[BackendT], problem: Any, name: str | None = None) -> BackendT:
    """First backend of `backends` that can run `problem`, or the one called `name` and no other.

    Raises:
        ValueError: no backend is called `name`.
        UnsupportedError: the backends asked cannot run `problem`.
    """
    if _watcher is not None:
        _watcher(explain(backends, problem, name))
    candidates: Iterable[BackendT] = backends if name is None else (find(backends, name),)
    refusals = []
    unverified = False
    for backend in candidates:
        reasons = why_not(backend, problem)
        if not reasons and name is None and (why := only_by_name(backend, problem, backends)):
            reasons = [f"{BY_NAME} ({why})"]
            unverified |= why == verified.NOT_VERIFIED
        if not reasons:
            if unverified and not is_compiling():
                verified.warn_once()
            return backend
        refusals.append((backend.NAME, reasons))
    raise UnsupportedError(_refusal(refusals, problem, name))


def _refusal(refusals: list[tuple[str, list[str]]], problem: Any, name: str | None) -> str:
    # Dynamo keeps a message of constants alone, and sizes may be symbols.
    what = "this call" if is_compiling() else problem
    text = f"no backend can run {what}" if name is None else f"backend {name!r} cannot run {what}"
    for backend, reasons in refusals:
        for reason in reasons:
            text += f"\n  {backend}: {reason}"
    if name is not None:
        text += "\nhint: leave `backend` out, and the first that can runs the call"
    return text


def explain(backends: Sequence[BackendT], problem: Any, name: str | None = None) -> Explanation:
    """What `select` would do with `problem`, and every backend's reasons; runs nothing."""
    reasons = tuple((backend.NAME, tuple(why_not(backend, problem))) for backend in backends)
    by_name = {b.NAME: why for b in backends if (why := only_by_name(b, problem, backends))}
    asked = {b.NAME for b in backends} - by_name.keys() if name is None else {name}
    able = [backend for backend, why in reasons if not why and backend in asked]
    if name is not None:
        find(backends, name)
    chosen = able[0] if able else None
    detail = ""
    if not is_compiling():  # it looks at what no compiler can trace
        detail = next((getattr(b, "detail", str)() for b in backends if chosen == b.NAME), "")
    return Explanation(problem, chosen, reasons, detail, tuple(by_name.items()))


_watcher: Callable[[Explanation | str], None] | None = None


@contextlib.contextmanager
def watching(tell: Callable[[Explanation | str], None]) -> Iterator[None]:
    """Within this, `tell` hears of each choice of a backend, and of what modules `note`.

    No plan of before holds, so that calls that ran already are heard of as well; a call that is
    repeated within is not chosen for again.
    """
    global _watcher
    before, _watcher = _watcher, tell
    forget_plans()
    try:
        yield
    finally:
        _watcher = before
        forget_plans()


def is_watched() -> bool:
    """True while somebody is `watching`: what costs time to say need not be said otherwise."""
    return _watcher is not None


def note(text: str) -> None:
    """For modules: tell whoever is watching how a call is run."""
    if _watcher is not None:
        _watcher(text)


_SWITCH = "FUSED_ATTN_BACKENDS"


def only_by_name(backend: Backend, problem: Any, backends: Sequence[Backend] = ()) -> str | None:
    """Why `backend` is not to be taken for `problem` unless it is asked for; None if it may be.

    Args:
        backends: all of the operation, for a backend that is slower than torch's own functions.
    """
    off, on = _switches()
    if backend.NAME in off:
        return f"{_SWITCH} switches it off"
    if backend.NAME in on:
        return None
    ask = getattr(backend, "only_by_name", None)
    why = None if ask is None else ask(problem)
    if why is None and hasattr(backend, "slower") and _torch_serves(problem, backends):
        why = backend.slower(problem)
    return why


def _torch_serves(problem: Any, backends: Sequence[Backend]) -> bool:
    """Whether torch's own functions can run `problem`, and may."""
    return any(
        is_torchs(other) and not why_not(other, problem) and only_by_name(other, problem) is None
        for other in backends
    )


def _switches() -> tuple[list[str], list[str]]:
    """Names of backends that the environment switches off ("-cuda,triton") and on ("cuda")."""
    off, on = [], []
    for word in os.environ.get(_SWITCH, "").replace(" ", "").split(","):
        if word.startswith("-"):
            off.append(word[1:])
        elif word:
            on.append(word.removeprefix("+"))
    return off, on


class Route(enum.Enum):
    """How the backend that was chosen comes to its work."""

    KERNEL = "called directly"
    OPERATOR = "through an operator of torch's, for those who trace or watch"
    FORMULA = "ordinary torch code, which everyone can look into"


KERNEL, OPERATOR, FORMULA = Route


def route(operands: Iterable[Any], backend: Backend) -> Route:
    """How a call with these operands gets to the backend that was chosen for it."""
    if is_formula(backend):
        return FORMULA
    if not is_plain(operands):
        subclasses.understand(operands)
        return OPERATOR
    return OPERATOR if is_traced() else KERNEL


class Plan(NamedTuple):
    """What a signature comes to: its scalars in the kernels' form, and who runs it, how."""

    options: Any
    backend: Any
    needs_grad: bool
    route: Route


PlanT = TypeVar("PlanT")
OperandsT = TypeVar("OperandsT", bound=tuple[Any, ...])
ScalarsT = TypeVar("ScalarsT", bound=tuple[Any, ...])


class PlanCache(Generic[PlanT]):
    """Remembers what a call comes to, so that a repeated call costs one look-up.

    What must be checked, who can run it and by which route depends on the classes, shapes, dtypes
    and devices of the tensors, on whether gradients are wanted, and on scalars only, as long as
    nobody transforms, traces or watches operators. Where somebody does, every call is looked at by
    itself. A plan that cannot be made (the call is wrong) is not kept.
    """

    _MAX_PLANS = 4096

    def __init__(self) -> None:
        self._plans: dict[Hashable, PlanT] = {}
        self.latest: PlanT | None = None  # of the latest eager call
        _caches.append(self._plans)

    def get(
        self,
        make_plan: Callable[[OperandsT, ScalarsT], PlanT],
        operands: OperandsT,
        scalars: ScalarsT,
    ) -> PlanT:
        """`make_plan(operands, scalars)`, which is called the first time only."""
        if is_compiling():
            return make_plan(operands, scalars)
        key = _call_key()(operands, scalars)
        plan = None if key is None else self._plans.get(key)
        if plan is None:
            plan = make_plan(operands, scalars)
            if key is not None:
                if len(self._plans) >= self._MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        self.latest = plan
        return plan


_caches: list[dict[Hashable, Any]] = []


def forget_plans() -> None:
    """Empty every `PlanCache`: what they say no longer holds."""
    for plans in _caches:
        plans.clear()


def _call_key_in_python(operands: tuple[Any, ...], scalars: tuple[Any, ...]) -> Hashable | None:
    if not is_plain(operands) or is_traced():
        return None
    if higher_order.needs_formula() or higher_order.forward_mode():
        return None
    if not all(higher_order.is_alive(x) for x in operands if x is not None):
        return None
    grad = torch.is_grad_enabled()
    tensors = tuple(
        None if x is None else (type(x), x.shape, x.dtype, x.device, grad and x.requires_grad)
        for x in operands
    )
    try:
        hash(scalars)
    except TypeError:
        return None
    return tensors, scalars


@functools.cache
def _call_key() -> Callable[[tuple[Any, ...], tuple[Any, ...]], Hashable | None]:
    """What makes the key of a call, or None for one that must be looked at by itself."""
    return native.module().call_key if native.why_not() is None else _call_key_in_python


def backward_is_plain(dout: Tensor) -> bool:
    """True if a backward that is given `dout` may call a kernel without looking further.

    Where it says False, `higher_order.backward_needs_formula` and `is_traced` know more.
    """
    return not is_compiling() and _backward_is_plain()(dout)


def _backward_is_plain_in_python(dout: Tensor) -> bool:
    return (
        is_plain((dout,)) and not higher_order.backward_needs_formula((dout,)) and not is_traced()
    )


@functools.cache
def _backward_is_plain() -> Callable[[Tensor], bool]:
    compiled = native.why_not() is None
    return native.module().backward_is_plain if compiled else _backward_is_plain_in_python


def is_plain(operands: Iterable[Any]) -> bool:
    """True if all are torch's own tensors: no subclass that would want to see the operators."""
    plain = (Tensor, torch.nn.Parameter)
    return all(type(x) in plain for x in operands if x is not None)


def is_traced() -> bool:
    """True while somebody compiles, exports or watches operators: they must see the operators."""
    return is_compiling() or torch._C._len_torch_dispatch_stack() > 0
