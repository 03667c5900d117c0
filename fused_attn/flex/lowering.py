"""From an expression to the instructions of `pairs.py`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .expression import Expression, Node
from .pairs import CannotCompile, Builder, Value
from .vectors import Sizes, Vectors

aten: Any = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_WHOLE = (torch.int32, torch.int64, torch.bool)
# Of float32 numbers these give what rounding a float64 result gives.
_EXACT = {"add", "sub", "rsub", "mul", "div", "neg", "abs", "sqrt", "maximum", "minimum", "relu"}
_EXACT |= {"where", "masked_fill", "clamp", "clamp_min", "clamp_max", "_to_copy", "sign", "index"}
_EXACT |= {"select", "floor", "ceil", "trunc", "reciprocal"}


@dataclass(eq=False)
class Leaf:
    """A vector or a table that instructions load.

    Attributes:
        place: "one", "query", "key" or "distance"; "table" of a table.
        source: as torch made it, perhaps with a history.
        tensor: as the kernels read it.
        batch_and_head_first: of a table whose first indices are b and h.
    """

    place: str
    source: Tensor
    tensor: Tensor
    batch_and_head_first: bool = False


class Lowering:
    """Puts expressions of one call into one builder, with the leaves of all.

    Args:
        wide: the dtype of scores.
    """

    def __init__(self, sizes: Sizes, wide: torch.dtype) -> None:
        self.build = Builder()
        self.leaves: list[Leaf] = []
        self.loads: dict[Value, Leaf] = {}  # of real numbers
        self.sizes, self.wide = sizes, wide

    def score(self) -> Value:
        return self.build.make("load_score")

    def lower(self, expression: Expression, vectors: Vectors, node: Node | None = None) -> Value:
        """The value of an expression's node, its result if None."""
        result = expression.result if node is None else node
        return _Nodes(self, expression, vectors).value(result)

    def real(self, value: Value, dtype: torch.dtype | None = None) -> Value:
        """As a real number of torch's `dtype`."""
        if not value.real:
            if value.operation == "constant_int":
                return self.build.number(value.constant)
            exact = max(map(abs, value.bounds or ())) <= 1 << 24
            value = self.build.make("from_int", value)
            return value if exact else self.rounded(value, dtype)
        return value

    def rounded(self, value: Value, dtype: torch.dtype | None) -> Value:
        """torch computes in float32 what is made of positions alone, even where scores are wide."""
        if self.wide != torch.float64 or dtype != torch.float32 or not value.real:
            return value
        if value.operation == "constant":
            return self.build.number(struct.unpack("f", struct.pack("f", value.constant))[0])
        return self.build.make("to_float32", value)

    def add_leaf(self, place: str, source: Tensor, first: bool = False) -> tuple[int, Any]:
        """The number of a leaf and the bounds of its whole numbers, None of real ones."""
        plain = source.detach()
        real = plain.is_floating_point()
        if not real and plain.dtype not in _WHOLE:
            plain = plain.long()
        bounds = None
        if not real:
            low, high = (int(x) for x in plain.aminmax()) if plain.numel() else (0, 0)
            bounds = (low, high)
        if place != "table":
            plain = plain.to(self.wide if real else torch.int32).contiguous()
        self.leaves.append(Leaf(place, source, plain, first))
        return len(self.leaves) - 1, bounds


class _Nodes:
    """The nodes of one expression."""

    def __init__(self, owner: Lowering, expression: Expression, vectors: Vectors) -> None:
        self.owner, self.build, self.vectors = owner, owner.build, vectors
        self._inputs = {node: name for name, node in expression.inputs.items()}
        self._values: dict[Node, Value] = {}

    def value(self, node: Node) -> Value:
        if node not in self._values:
            place = self.vectors.place(node)
            if self._inputs.get(node) == "score":
                self._values[node] = self.owner.score()
            elif place is not None:
                self._values[node] = self._vector(node, place)
            else:
                self._values[node] = self._computed(node)
        return self._values[node]

    def _vector(self, node: Node, place: str) -> Value:
        source = self.vectors.vector(node)
        number, bounds = self.owner.add_leaf(place, source)
        name = f"load_{place}" + ("" if bounds is None else "_int")
        load = self.build.make(name, bounds=bounds, leaf=number)
        if bounds is None:
            self.owner.loads[load] = self.owner.leaves[number]
        return load

    def _computed(self, node: Node) -> Value:
        name = node.operation.overloadpacket.__name__
        if name in ("index", "select"):
            return self._gather(node)
        rule = _RULES.get(name)
        if rule is None:
            raise CannotCompile(f"calls `{name}`, for which there is no instruction")
        if node.dtype in _HALVES and name not in _SAME:
            raise CannotCompile(f"computes in {node.dtype}")
        single = self.owner.wide == torch.float64 and node.dtype == torch.float32
        if single and name not in _EXACT | _SAME.keys():
            raise CannotCompile(f"calls `{name}` in float32 where scores are float64")
        return self.owner.rounded(rule(self, node), node.dtype)

    def arg(self, node: Node, number: int) -> Value:
        """An argument, as the kind of number that the node gives."""
        return self.as_kind(self.raw(node.args[number]), node)

    def as_kind(self, value: Value, node: Node) -> Value:
        if node.dtype is not None and node.dtype.is_floating_point:
            return self.owner.rounded(self.owner.real(value, node.dtype), node.dtype)
        if value.real:
            raise CannotCompile("makes whole numbers of real ones")
        return value

    def raw(self, arg: Any) -> Value:
        if isinstance(arg, Node):
            return self.value(arg)
        if isinstance(arg, (bool, int)):
            return self.build.whole(int(arg))
        if isinstance(arg, float):
            return self.build.number(arg)
        raise CannotCompile(f"takes an argument {arg!r}")

    # --- tables ---

    def _gather(self, node: Node) -> Value:
        base, indices = self._chosen(node)
        if self.vectors.depends(base):
            raise CannotCompile("takes from a table that differs from pair to pair")
        table = self.vectors.value(base)
        if table.dim() > 4:
            raise CannotCompile("takes from a table of more than four dimensions")
        if any(index is None for index in indices):
            raise CannotCompile("takes part of a table where it could take a number")
        if any(isinstance(x, Node) and x.dtype == torch.bool for x in indices):
            raise CannotCompile("takes by a truth")
        places = [self.raw(index) for index in indices]
        if any(place.real for place in places):
            raise CannotCompile("takes by a real number")
        names = [self._inputs.get(x) if isinstance(x, Node) else None for x in indices]
        number, bounds = self.owner.add_leaf("table", table, names[:2] == ["b", "h"])
        name = "gather" if bounds is None else "gather_int"
        load = self.build.make(name, *places, bounds=bounds, leaf=number)
        if bounds is None:
            self.owner.loads[load] = self.owner.leaves[number]
        return load

    def _chosen(self, node: Node) -> tuple[Node, list[Any]]:
        """A table and what is taken of each of its dimensions; None where that is open."""
        if node.operation is aten.index.Tensor:
            base, chosen = self._chosen(node.args[0])
            left = [n for n, index in enumerate(chosen) if index is None]
            for place, index in zip(left, node.args[1], strict=False):
                chosen[place] = index
            return base, chosen
        if node.operation is aten.select.int:
            base, chosen = self._chosen(node.args[0])
            left = [n for n, index in enumerate(chosen) if index is None]
            chosen[left[node.args[1] % len(left)]] = node.args[2]
            return base, chosen
        if self.vectors.depends(node):
            return node, []
        return node, [None] * self.vectors.value(node).dim()


Rule = Callable[[_Nodes, Node], Value]


def _real_rule(name: str) -> Rule:
    return lambda nodes, node: nodes.build.make(name, nodes.arg(node, 0))


def _arithmetic(name: str) -> Rule:
    def rule(nodes: _Nodes, node: Node) -> Value:
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


def _division(nodes: _Nodes, node: Node) -> Value:
    mode = dict(node.options).get("rounding_mode")
    if node.operation.overloadpacket is aten.floor_divide:
        mode = "floor"
    a, b = nodes.arg(node, 0), nodes.arg(node, 1)
    if a.real and mode is not None:
        raise CannotCompile("divides real numbers to whole ones")
    if not a.real:
        return nodes.build.whole_binary(f"{mode}_div", a, b)
    return nodes.build.make("div", a, b)


def _remainder(nodes: _Nodes, node: Node) -> Value:
    a, b = nodes.arg(node, 0), nodes.arg(node, 1)
    if a.real:
        raise CannotCompile("takes a remainder of real numbers")
    return nodes.build.whole_binary("remainder", a, b)


def _extreme(name: str) -> Rule:
    def rule(nodes: _Nodes, node: Node) -> Value:
        a, b = nodes.arg(node, 0), nodes.arg(node, 1)
        return nodes.build.make(name, a, b) if a.real else nodes.build.whole_binary(name, a, b)

    return rule


def _bounded(nodes: _Nodes, value: Value, bound: Value, beyond: str) -> Value:
    return nodes.build.select(nodes.build.compare(beyond, value, bound), bound, value)


def _clamp(nodes: _Nodes, node: Node) -> Value:
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


def _relu(nodes: _Nodes, node: Node) -> Value:
    value = nodes.arg(node, 0)
    zero = nodes.build.number(0.0) if value.real else nodes.build.whole(0)
    return nodes.build.select(nodes.build.compare("le", value, zero), zero, value)


def _unary(name: str) -> Rule:
    def rule(nodes: _Nodes, node: Node) -> Value:
        a = nodes.arg(node, 0)
        if not a.real:
            return nodes.build.whole_unary(name, a)
        return nodes.build.neg(a) if name == "neg" else nodes.build.make(name, a)

    return rule


def _where(nodes: _Nodes, node: Node) -> Value:
    which = nodes.raw(node.args[0])
    return nodes.build.select(which, nodes.arg(node, 1), nodes.arg(node, 2))


def _masked_fill(nodes: _Nodes, node: Node) -> Value:
    which = nodes.raw(node.args[1])
    return nodes.build.select(which, nodes.arg(node, 2), nodes.arg(node, 0))


def _compare(nodes: _Nodes, node: Node) -> Value:
    a, b = nodes.raw(node.args[0]), nodes.raw(node.args[1])
    if a.real or b.real:
        kinds = [x.dtype for x in node.args if isinstance(x, Node) and x.dtype is not None]
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
        a, b = (nodes.owner.rounded(nodes.owner.real(x, dtype), dtype) for x in (a, b))
    return nodes.build.compare(node.operation.overloadpacket.__name__, a, b)


def _logical(name: str) -> Rule:
    def rule(nodes: _Nodes, node: Node) -> Value:
        a, b = (nodes.raw(arg) for arg in node.args)
        if node.dtype == torch.bool:
            a, b = nodes.build.truth(a), nodes.build.truth(b)
        return nodes.build.whole_binary(name, a, b)

    return rule


def _not(nodes: _Nodes, node: Node) -> Value:
    a = nodes.raw(node.args[0])
    if node.dtype == torch.bool:
        return nodes.build.compare("eq", nodes.build.truth(a), nodes.build.whole(0))
    return nodes.build.whole_binary("sub", nodes.build.whole(-1), a)


def _power(nodes: _Nodes, node: Node) -> Value:
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


def _square_root_below(nodes: _Nodes, node: Node) -> Value:
    root = nodes.build.make("sqrt", nodes.arg(node, 0))
    return nodes.build.make("div", nodes.build.number(1.0), root)


def _reciprocal(nodes: _Nodes, node: Node) -> Value:
    return nodes.build.make("div", nodes.build.number(1.0), nodes.arg(node, 0))


def _exp2(nodes: _Nodes, node: Node) -> Value:
    # e^(x ln 2), not a power: its derivative is a product, and powers are slow.
    return nodes.build.make(
        "exp", nodes.build.mul(nodes.arg(node, 0), nodes.build.number(math.log(2.0)))
    )


def _log2(nodes: _Nodes, node: Node) -> Value:
    log = nodes.build.make("log", nodes.arg(node, 0))
    return nodes.build.mul(log, nodes.build.number(1.0 / math.log(2.0)))


def _silu(nodes: _Nodes, node: Node) -> Value:
    a = nodes.arg(node, 0)
    return nodes.build.mul(a, nodes.build.make("sigmoid", a))


def _copy(nodes: _Nodes, node: Node) -> Value:
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


def _same(nodes: _Nodes, node: Node) -> Value:
    return nodes.raw(node.args[0])


def _detached(nodes: _Nodes, node: Node) -> Value:
    value = nodes.raw(node.args[0])
    return nodes.build.detached(value)


def _filled(nodes: _Nodes, node: Node) -> Value:
    name = node.operation.overloadpacket.__name__
    fixed = 0.0 if "zeros" in name else 1.0
    value: Any = fixed if "full" not in name else node.args[-1]
    if isinstance(value, Node) or node.dtype is None:
        raise CannotCompile("fills with a tensor")
    if node.dtype.is_floating_point:
        return nodes.build.number(float(value))
    return nodes.build.whole(int(value))


_SAME: dict[str, Rule] = dict.fromkeys(("clone", "alias", "lift_fresh", "lift_fresh_copy"), _same)
_RULES: dict[str, Rule] = {
    **{name: _arithmetic(name) for name in ("add", "sub", "mul", "rsub")},
    **{name: _compare for name in ("lt", "le", "gt", "ge", "eq", "ne")},
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
    **_SAME,
}
