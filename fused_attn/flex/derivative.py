"""Derivatives of values, as more values: reverse mode, one rule an instruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .pairs import Builder, Value

# What each argument receives, of a value and the derivative by it; None: nothing.
Rule = Callable[[Builder, Value, Value], tuple[Value | None, ...]]


def derivatives(build: Builder, result: Value, wanted: Iterable[Value]) -> dict[Value, Value]:
    """The result's derivative by each of `wanted` on which it depends."""
    goals = set(wanted)
    order = _between(result, goals)
    found = {result: build.number(1.0)}
    for value in sorted(order, key=lambda x: x.number, reverse=True):
        if value not in found or value in goals:
            continue
        rule = RULES.get(value.operation)
        if rule is None:  # steps, whole numbers, and what was detached
            continue
        for arg, part in zip(value.args, rule(build, value, found[value]), strict=True):
            if part is not None and arg in order:
                found[arg] = build.add(found[arg], part) if arg in found else part
    return {value: found[value] for value in goals if value in found}


def _between(result: Value, goals: set[Value]) -> set[Value]:
    """What depends on a goal, of what the result is made of."""
    known: dict[Value, bool] = {}

    def reaches(value: Value) -> bool:
        if value not in known:
            inside = [reaches(arg) for arg in value.args]
            known[value] = value in goals or any(inside)
        return known[value]

    reaches(result)
    return {value for value, yes in known.items() if yes}


def _where(build: Builder, which: Value, yes: Value) -> Value:
    return build.select(which, yes, build.number(0.0))


def _div(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    whole = build.make("div", g, x.args[1])
    return whole, build.neg(build.mul(whole, x))


def _extreme(larger: str) -> Rule:
    def rule(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
        a, b = x.args
        half = _where(build, build.compare("eq", a, b), build.mul(g, build.number(0.5)))
        first = build.select(build.compare(larger, a, b), g, half)
        return first, build.select(build.compare(larger, b, a), g, half)

    return rule


def _pow(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    exponent = x.args[1].constant
    if exponent == 0:
        return build.number(0.0), None
    rest = build.make("pow", x.args[0], build.number(exponent - 1))
    return build.mul(g, build.mul(build.number(exponent), rest)), None


def _tanh(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    return (build.mul(g, build.sub(build.number(1.0), build.mul(x, x))),)


def _sigmoid(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    return (build.mul(g, build.mul(x, build.sub(build.number(1.0), x))),)


def _erf(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    a = x.args[0]
    bell = build.make("exp", build.neg(build.mul(a, a)))
    return (build.mul(g, build.mul(build.number(2.0 / math.sqrt(math.pi)), bell)),)


def _by(operation: str, negative: bool = False) -> Rule:
    """The gradient times an operation on the argument."""

    def rule(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
        slope = build.mul(g, build.make(operation, x.args[0]))
        return (build.neg(slope) if negative else slope,)

    return rule


def _select(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    which = x.args[0]
    return None, _where(build, which, g), build.select(which, build.number(0.0), g)


def _mul(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    return build.mul(g, x.args[1]), build.mul(g, x.args[0])


def _sqrt(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    return (build.make("div", build.mul(g, build.number(0.5)), x),)


def _log1p(build: Builder, x: Value, g: Value) -> tuple[Value | None, ...]:
    return (build.make("div", g, build.add(x.args[0], build.number(1.0))),)


RULES: dict[str, Rule] = {
    "add": lambda build, x, g: (g, g),
    "sub": lambda build, x, g: (g, build.neg(g)),
    "mul": _mul,
    "div": _div,
    "max": _extreme("gt"),
    "min": _extreme("lt"),
    "pow": _pow,
    "neg": lambda build, x, g: (build.neg(g),),
    "abs": _by("sign"),
    "sqrt": _sqrt,
    "exp": lambda build, x, g: (build.mul(g, x),),
    "log": lambda build, x, g: (build.make("div", g, x.args[0]),),
    "log1p": _log1p,
    "expm1": lambda build, x, g: (build.mul(g, build.add(x, build.number(1.0))),),
    "sin": _by("cos"),
    "cos": _by("sin", negative=True),
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "erf": _erf,
    "to_float32": lambda build, x, g: (g,),
    "select": _select,
}
