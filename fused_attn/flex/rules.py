"""What instructions torch's operations become, a rule an operation."""

from __future__ import annotations

import math
from typing import Any

import torch

from .expression import Node
from .lowering import SAME, Nodes, Rule
from .pairs import CannotCompile, Value

aten: Any = torch.ops.aten


def _real_rule(name: str) -> Rule:
    return lambda nodes, node: nodes.build.make(name, nodes.arg(node, 0))


def _arithmetic(name: str) -> Rule:
    def rule(nodes: Nodes, node: Node) -> Value:
        if dict(node.options).get("alpha", 1) != 1 or len(node.args) > 2:
            raise CannotCompile("adds a multiple")
        if node.dtype == torch.bool:
            raise CannotCompile("adds truths")
        a, b = nodes.arg(node, 0), nodes.arg(node, 1)
        if name == "rsub":
            a, b = b, a
        verb = {"rsub": "sub"}.get(name, name)
        if not a.real:
            return nodes.build.whole_binary(verb, a, b)
        made: Value = getattr(nodes.build, verb)(a, b)
        return made

    return rule


def _division(nodes: Nodes, node: Node) -> Value:
    mode = dict(node.options).get("rounding_mode")
    if node.operation.overloadpacket is aten.floor_divide:
        mode = "floor"
    a, b = nodes.arg(node, 0), nodes.arg(node, 1)
    if a.real and mode is not None:
        raise CannotCompile("divides real numbers to whole ones")
    if not a.real:
        return nodes.build.whole_binary(f"{mode}_div", a, b)
    return nodes.build.make("div", a, b)


def _remainder(nodes: Nodes, node: Node) -> Value:
    a, b = nodes.arg(node, 0), nodes.arg(node, 1)
    if a.real:
        raise CannotCompile("takes a remainder of real numbers")
    return nodes.build.whole_binary("remainder", a, b)


def _extreme(name: str) -> Rule:
    def rule(nodes: Nodes, node: Node) -> Value:
        a, b = nodes.arg(node, 0), nodes.arg(node, 1)
        return nodes.build.make(name, a, b) if a.real else nodes.build.whole_binary(name, a, b)

    return rule


def _bounded(nodes: Nodes, value: Value, bound: Value, beyond: str) -> Value:
    return nodes.build.select(nodes.build.compare(beyond, value, bound), bound, value)


def _clamp(nodes: Nodes, node: Node) -> Value:
    name = node.operation.overloadpacket.__name__
    value = nodes.arg(node, 0)
    given = dict(node.options)
    low, high = (*node.args[1:], None, None)[:2]
    if name == "clamp_max":
        low, high = None, low
    low, high = given.get("min", low), given.get("max", high)
    if low is not None:
        value = _bounded(nodes, value, nodes.as_kind(nodes.raw(low), node), "lt")
    if high is not None:
        value = _bounded(nodes, value, nodes.as_kind(nodes.raw(high), node), "gt")
    return value


def _relu(nodes: Nodes, node: Node) -> Value:
    value = nodes.arg(node, 0)
    zero = nodes.build.number(0.0) if value.real else nodes.build.whole(0)
    return nodes.build.select(nodes.build.compare("le", value, zero), zero, value)


def _unary(name: str) -> Rule:
    def rule(nodes: Nodes, node: Node) -> Value:
        a = nodes.arg(node, 0)
        if not a.real:
            return nodes.build.whole_unary(name, a)
        return nodes.build.neg(a) if name == "neg" else nodes.build.make(name, a)

    return rule


def _where(nodes: Nodes, node: Node) -> Value:
    which = nodes.raw(node.args[0])
    return nodes.build.select(which, nodes.arg(node, 1), nodes.arg(node, 2))


def _masked_fill(nodes: Nodes, node: Node) -> Value:
    which = nodes.raw(node.args[1])
    return nodes.build.select(which, nodes.arg(node, 2), nodes.arg(node, 0))


def _compare(nodes: Nodes, node: Node) -> Value:
    a, b = nodes.raw(node.args[0]), nodes.raw(node.args[1])
    if a.real or b.real:
        kinds = [x.dtype for x in node.args if isinstance(x, Node) and x.dtype is not None]
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
        a, b = (nodes.owner.rounded(nodes.owner.real(x, dtype), dtype) for x in (a, b))
    return nodes.build.compare(node.operation.overloadpacket.__name__, a, b)


def _logical(name: str) -> Rule:
    def rule(nodes: Nodes, node: Node) -> Value:
        a, b = (nodes.raw(arg) for arg in node.args)
        if node.dtype == torch.bool:
            a, b = nodes.build.truth(a), nodes.build.truth(b)
        return nodes.build.whole_binary(name, a, b)

    return rule


def _not(nodes: Nodes, node: Node) -> Value:
    a = nodes.raw(node.args[0])
    if node.dtype == torch.bool:
        return nodes.build.compare("eq", nodes.build.truth(a), nodes.build.whole(0))
    return nodes.build.whole_binary("sub", nodes.build.whole(-1), a)


def _power(nodes: Nodes, node: Node) -> Value:
    base, exponent = nodes.arg(node, 0), node.args[1]
    if isinstance(exponent, (int, float)) and exponent in (1, 2, 3):
        times = [base] * int(exponent)
        if not base.real:
            made = times[0]
            for each in times[1:]:
                made = nodes.build.whole_binary("mul", made, each)
            return made
        made = times[0]
        for each in times[1:]:
            made = nodes.build.mul(made, each)
        return made
    if not base.real:
        raise CannotCompile("raises a whole number to a power")
    if exponent == 0.5:
        return nodes.build.make("sqrt", base)
    if exponent == -1:
        return nodes.build.make("div", nodes.build.number(1.0), base)
    if not isinstance(exponent, (int, float)):
        raise CannotCompile("raises to a power that is no constant")
    return nodes.build.make("pow", base, nodes.build.number(exponent))


def _square_root_below(nodes: Nodes, node: Node) -> Value:
    root = nodes.build.make("sqrt", nodes.arg(node, 0))
    return nodes.build.make("div", nodes.build.number(1.0), root)


def _reciprocal(nodes: Nodes, node: Node) -> Value:
    return nodes.build.make("div", nodes.build.number(1.0), nodes.arg(node, 0))


def _exp2(nodes: Nodes, node: Node) -> Value:
    # e^(x ln 2), not a power: its derivative is a product, and powers are slow.
    return nodes.build.make(
        "exp", nodes.build.mul(nodes.arg(node, 0), nodes.build.number(math.log(2.0)))
    )


def _log2(nodes: Nodes, node: Node) -> Value:
    log = nodes.build.make("log", nodes.arg(node, 0))
    return nodes.build.mul(log, nodes.build.number(1.0 / math.log(2.0)))


def _silu(nodes: Nodes, node: Node) -> Value:
    a = nodes.arg(node, 0)
    return nodes.build.mul(a, nodes.build.make("sigmoid", a))


def _copy(nodes: Nodes, node: Node) -> Value:
    value, dtype = nodes.raw(node.args[0]), node.dtype
    if dtype == torch.bool:
        return nodes.build.truth(value)
    if dtype == torch.float64 != nodes.owner.wide and value.real:
        raise CannotCompile("asks for float64 where scores are float32")
    if dtype in (torch.float32, torch.float64):
        return nodes.as_kind(value, node)
    if value.real or dtype not in (torch.int32, torch.int64):
        raise CannotCompile(f"makes {dtype} of {'real' if value.real else 'whole'} numbers")
    return value


def _same(nodes: Nodes, node: Node) -> Value:
    return nodes.raw(node.args[0])


def _detached(nodes: Nodes, node: Node) -> Value:
    value = nodes.raw(node.args[0])
    return nodes.build.detached(value)


def _filled(nodes: Nodes, node: Node) -> Value:
    name = node.operation.overloadpacket.__name__
    fixed = 0.0 if "zeros" in name else 1.0
    value: Any = fixed if "full" not in name else node.args[-1]
    if isinstance(value, Node) or node.dtype is None:
        raise CannotCompile("fills with a tensor")
    if node.dtype.is_floating_point:
        return nodes.build.number(float(value))
    return nodes.build.whole(int(value))


RULES: dict[str, Rule] = {
    **{name: _arithmetic(name) for name in ("add", "sub", "mul", "rsub")},
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare),
    **{name: _unary(name) for name in ("neg", "abs")},
    **dict.fromkeys(("sign", "sgn"), _unary("sign")),
    **{name: _real_rule(name) for name in ("sqrt", "exp", "log", "log1p", "expm1", "sin", "cos")},
    **{name: _real_rule(name) for name in ("tanh", "sigmoid", "erf", "floor", "ceil", "trunc")},
    **dict.fromkeys(("bitwise_and", "logical_and"), _logical("and")),
    **dict.fromkeys(("bitwise_or", "logical_or"), _logical("or")),
    **dict.fromkeys(("bitwise_xor", "logical_xor"), _logical("xor")),
    **dict.fromkeys(("bitwise_not", "logical_not"), _not),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("div", "floor_divide"), _division),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), _filled),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full"), _filled),
    "maximum": _extreme("max"),
    "minimum": _extreme("min"),
    "remainder": _remainder,
    "relu": _relu,
    "where": _where,
    "masked_fill": _masked_fill,
    "pow": _power,
    "rsqrt": _square_root_below,
    "reciprocal": _reciprocal,
    "exp2": _exp2,
    "log2": _log2,
    "silu": _silu,
    "_to_copy": _copy,
    "detach": _detached,
    **dict.fromkeys(SAME, _same),
}
