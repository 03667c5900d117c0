"""Who runs a call, and why the others do not: before the call, and after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import dispatch
from .attention.api import attention, explain_attention
from .explanation import Explanation
from .operations import is_operation, operation_of

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class ModuleExplanation:
    """Who runs the calls inside a module, or inside a function that is made of others.

    Attributes:
        module: name of the module's class, or of the function.
        calls: an `Explanation` for each different call, in order.
        notes: what modules say of how they run: packed or not, and why.
    """

    module: str
    calls: tuple[Explanation, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self.module, *(f"  {note}" for note in self.notes)]
        for call in self.calls:
            lines += [f"  {line}" for line in str(call).splitlines()]
        if not self.calls and not self.notes:
            lines.append("  runs no operation of fused_attn")
        return "\n".join(lines)


class _Heard(BaseException):
    """Ends a call before it computes; no `except Exception` on the way stops it."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__()
        self.explanation = explanation


def explain(*arguments: Any, **named: Any) -> Any:
    """Which backend would run a call, and why each other one would not.

    `explain(q, k, v, ...)` is of `attention(q, k, v, ...)`. Any other public function comes first,
    and so does a module::

        print(fused_attn.explain(q, k, v, causal=True))
        print(fused_attn.explain(fused_attn.layer_norm, x, (64,)))
        print(fused_attn.explain(module, x, x, x, need_weights=False))

    The call is checked as the function checks it, and for an operation nothing is computed. A
    module is called once, as it is (mode, gradients, hooks), and so is a function that is made of
    others (`flex_attention`, `merge_attention`, `attention_backward`, the searches).

    Returns:
        An `Explanation`: print it, or read its `chosen` and `reasons`. For what is called a
        `ModuleExplanation` with its `calls`, each different one once, and `notes`.

    Raises:
        TypeError, ValueError: as the function or module.
    """
    if not arguments or isinstance(arguments[0], Tensor) or not callable(arguments[0]):
        return explain_attention(*arguments, **named)
    first, *rest = arguments
    if isinstance(first, nn.Module):
        return _explain_calls(type(first).__name__, first, rest, named)
    if first is attention:
        return explain_attention(*rest, **named)
    if not is_operation(first) and _is_ours(first):
        return _explain_calls(first.__name__, first, rest, named)
    operation_of(first)

    def hear(told: Explanation | str) -> None:
        if isinstance(told, Explanation):
            raise _Heard(told)

    with dispatch.watching(hear):
        try:
            first(*rest, **named)
        except _Heard as heard:
            return heard.explanation
    raise AssertionError(f"{first.__name__} has asked no backend")


def _is_ours(function: Callable[..., Any]) -> bool:
    """Public functions that are made of others."""
    return inspect.isfunction(function) and function.__module__.split(".")[0] == PACKAGE


def _explain_calls(
    name: str, run: Callable[..., Any], arguments: list[Any], named: dict[str, Any]
) -> ModuleExplanation:
    told: list[Explanation | str] = []
    with dispatch.watching(told.append):
        run(*arguments, **named)
    unique = list(dict.fromkeys(told))
    calls = tuple(each for each in unique if isinstance(each, Explanation))
    notes = tuple(each for each in unique if isinstance(each, str))
    return ModuleExplanation(name, calls, notes)


def last_backend(function: Callable[..., Any] = attention) -> str | None:
    """Name of the backend that ran the latest eager call of an operation in this process, or None.

    Args:
        function: a public function of the operation: `attention`, `layer_norm`, ...
    """
    plan = operation_of(function).plans.latest
    return None if plan is None else plan.backend.NAME
