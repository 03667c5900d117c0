"""The formula of a module's `forward`: what it returns, as one expression without any names.

Hundreds of classes in public code compute the same few things, under other names of variables,
attributes and methods. So `formula_of` reads the source of a class: assignments are put in the
place of their variables, methods in the place of their calls, arguments become `x0`, attributes of
the module `a0`, `a1`, ... in order of appearance. Two classes with one formula compute the same.
Code that it cannot follow to the end, a loop for instance, has no formula.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

_GLOBALS = {"torch": torch, "nn": nn, "F": F}
_FUNCTIONAL = ("nn.functional.", "torch.nn.functional.")


class Formula(NamedTuple):
    """What a `forward` returns, and the attributes that stand behind a0, a1, ..."""

    text: str
    attributes: tuple[str, ...]


Fused = Callable[..., "torch.Tensor | None"]  # (module, x, ...); None: run theirs


class Form(NamedTuple):
    """What is known about a formula.

    Attributes:
        make: names of the attributes -> what runs in the place of `forward`.
        why_not: (module, formula) -> why it cannot; "" if the module is no such thing at all.
    """

    make: Callable[[tuple[str, ...]], Fused]
    why_not: Callable[[Any, Formula], str | None]


class _Unknown(Exception):
    """The code does something that cannot be put into one expression."""


@functools.cache
def formula_of(cls: Any) -> Formula | None:
    """The formula of `cls.forward`; None if it has no source, or more than an expression."""
    try:
        expression = _inlined(cls, cls.forward, None)
    except (_Unknown, OSError, TypeError, SyntaxError, RecursionError):
        return None
    names: dict[str, str] = {}
    text = ast.unparse(_Numbered(names).visit(expression))
    for prefix in reversed(_FUNCTIONAL):
        text = text.replace(prefix, "F.")
    return Formula(text, tuple(names))


def _inlined(cls: type, function: Callable[..., Any], given: list[ast.expr] | None) -> ast.expr:
    """The expression that `function` returns, of arguments x0, x1, ... or those that are given."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise _Unknown
    for name, expected in _GLOBALS.items():
        if function.__globals__.get(name, expected) is not expected:
            raise _Unknown  # it means something else by that name
    names = [argument.arg for argument in tree.args.args]
    if tree.args.vararg or tree.args.kwarg or tree.args.kwonlyargs or names[:1] != ["self"]:
        raise _Unknown
    if given is None:
        given = [ast.Name(f"x{number}") for number in range(len(names) - 1)]
    if len(given) != len(names) - 1:
        raise _Unknown
    known = dict(zip(names[1:], given, strict=True))
    result = _run(cls, tree.body, known)
    if result is None:
        raise _Unknown
    return result


def _run(cls: type, body: list[ast.stmt], known: dict[str, ast.expr]) -> ast.expr | None:
    """Follow the statements; `known` is each variable's expression, and is brought up to date."""
    for statement in body:
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.Return) and value is not None:
            return _put_in(cls, value, known)
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            _assign(statement.targets[0], _put_in(cls, statement.value, known), known)
        elif isinstance(statement, ast.If):
            _choose(cls, statement, known)
        else:
            raise _Unknown
    return None


def _assign(target: ast.expr, value: ast.expr, known: dict[str, ast.expr]) -> None:
    if isinstance(target, ast.Name):
        known[target.id] = value
    elif isinstance(target, ast.Tuple):
        for number, each in enumerate(target.elts):
            _assign(each, ast.Subscript(value, ast.Constant(number), ast.Load()), known)
    else:
        raise _Unknown


def _choose(cls: type, statement: ast.If, known: dict[str, ast.expr]) -> None:
    """`if` whose branches assign: a variable is the one or the other expression."""
    test = _put_in(cls, statement.test, known)
    then, other = dict(known), dict(known)
    if _run(cls, statement.body, then) or _run(cls, statement.orelse, other):
        raise _Unknown
    for name in {*then, *other}:
        a, b = then.get(name), other.get(name)
        if a is None or b is None:
            known.pop(name, None)
        elif a is not b:
            known[name] = ast.IfExp(test, a, b)


def _put_in(cls: type, expression: ast.expr, known: dict[str, ast.expr]) -> ast.expr:
    result: ast.expr = _Inliner(cls, known).visit(copy.deepcopy(expression))
    return result


class _Inliner(ast.NodeTransformer):
    """Variables and methods of the module by what they stand for."""

    def __init__(self, cls: type, known: dict[str, ast.expr]) -> None:
        self.cls = cls
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.known.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        function = node.func
        method = None
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "self":
            method = inspect.getattr_static(self.cls, function.attr, None)
        node.args = [self.visit(each) for each in node.args]
        node.keywords = [self.visit(each) for each in node.keywords]
        if not inspect.isfunction(method):
            node.func = self.visit(node.func)
            return node
        if node.keywords:
            raise _Unknown
        return _inlined(self.cls, method, node.args)

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        raise _Unknown

    visit_ListComp = visit_GeneratorExp = visit_NamedExpr = visit_Lambda  # type: ignore[assignment]


class _Numbered(ast.NodeTransformer):
    """`self.anything` becomes a0, a1, ...; `names` keeps which is which."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return ast.Name(self.names.setdefault(node.attr, f"a{len(self.names)}"))
        self.generic_visit(node)
        return node
