"""Expressions of functions that were read before."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .expression import Expression, read

_MOST = 64
_known: OrderedDict[Hashable, tuple[Expression, list[Any]]] = OrderedDict()


def expression_of(
    function: Callable[..., Any], names: tuple[str, ...], what: str, like: Tensor
) -> Expression:
    """`read(...)`, done once for a function and what it captured.

    A function is the same if its code is, the numbers and functions around it are equal, and the
    tensors around it are the same objects. One that was bound anew to others is read again.
    """
    tensors: list[Tensor] = []
    try:
        what_it_is = _key_of(function, tensors, 0)
        # torch makes numbers of whole positions in its default dtype.
        key: Hashable = (names, like.dtype, like.device, torch.get_default_dtype(), what_it_is)
        hash(key)
    except TypeError:  # something around it cannot be told from what it may become
        return read(function, names, what, like)
    found = _known.get(key)
    if found is not None and all(alive() is not None for alive in found[1]):
        _known.move_to_end(key)
        expression, alive = found
        captured = [one() for one in alive]
        return Expression(expression.inputs, expression.nodes, expression.result, captured)
    expression = read(function, names, what, like)
    around = {id(tensor) for tensor in tensors}
    if all(id(tensor) in around for tensor in expression.captured):
        kept = Expression(expression.inputs, expression.nodes, expression.result, [])
        _known[key] = (kept, [weakref.ref(tensor) for tensor in expression.captured])
        if len(_known) > _MOST:
            _known.popitem(last=False)
    return expression


def _key_of(value: Any, tensors: list[Tensor], depth: int) -> Hashable:
    """What decides how a function is read; raises TypeError where that is unknown."""
    if depth > 8:
        raise TypeError
    if isinstance(value, Tensor):
        tensors.append(value)
        return (id(value), tuple(value.shape), value.dtype, value.device)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_key_of(each, tensors, depth + 1) for each in value))
    if isinstance(value, functools.partial):
        parts = (value.func, list(value.args), sorted(value.keywords.items()))
        return ("partial", *(_key_of(part, tensors, depth + 1) for part in parts))
    if isinstance(value, types.FunctionType):
        return _key_of_function(value, tensors, depth)
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType, type)):
        return id(value)
    raise TypeError


def _key_of_function(function: types.FunctionType, tensors: list[Tensor], depth: int) -> Hashable:
    around: list[Any] = [cell.cell_contents for cell in function.__closure__ or ()]
    around.append(list(function.__defaults__ or ()))
    names = _names_in(function.__code__)
    if function.__module__ is None or not function.__module__.startswith("torch."):
        around += [function.__globals__[name] for name in names if name in function.__globals__]
    return (function.__code__, *(_key_of(each, tensors, depth + 1) for each in around))


def _names_in(code: types.CodeType) -> list[str]:
    """Names that code reads, and the functions that it defines."""
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return [*code.co_names, *(name for each in inner for name in _names_in(each))]
