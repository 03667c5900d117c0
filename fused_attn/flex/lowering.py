"""From an expression to the instructions of `pairs.py`."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .expression import Expression, Node
from .pairs import Builder, CannotCompile, Value
from .vectors import Sizes, Vectors

aten: Any = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_WHOLE = (torch.int32, torch.int64, torch.bool)
# Of float32 numbers these give what rounding a float64 result gives.
_EXACT = {"add", "sub", "rsub", "mul", "div", "neg", "abs", "sqrt", "maximum", "minimum", "relu"}
_EXACT |= {"where", "masked_fill", "clamp", "clamp_min", "clamp_max", "_to_copy", "sign", "index"}
_EXACT |= {"select", "floor", "ceil", "trunc", "reciprocal"}


SAME = {"clone", "alias", "lift_fresh", "lift_fresh_copy"}  # what gives its argument

Rule: TypeAlias = "Callable[[Nodes, Node], Value]"


@dataclass(eq=False)
class Leaf:
    """A vector or a table that instructions load.

    Attributes:
        place: "one", "query", "key" or "distance"; "table" of a table.
        source: as torch made it, perhaps with a history.
        tensor: as the kernels read it.
        batch_and_head_first: of a table whose first indices are b and h.
        name: of the input that a vector is no more than, or "".
    """

    place: str
    source: Tensor
    tensor: Tensor
    batch_and_head_first: bool = False
    name: str = ""


class Lowering:
    """Puts expressions of one call into one builder, with the leaves of all.

    Args:
        wide: the dtype of scores.
        rules: what makes a value of a node, by the name of its operation (`rules.py`).
        computes_positions: whole numbers made of positions alone are computed pair by pair, not
            loaded from vectors.
    """

    def __init__(
        self,
        sizes: Sizes,
        wide: torch.dtype,
        rules: Mapping[str, Rule],
        computes_positions: bool = False,
    ) -> None:
        self.computes_positions = computes_positions
        self.rules = rules
        self.build = Builder()
        self.leaves: list[Leaf] = []
        self.loads: dict[Value, Leaf] = {}  # of real numbers
        self.sizes, self.wide = sizes, wide

    def copy(self) -> Lowering:
        """Another that may be added to."""
        other = copy.copy(self)
        other.build = self.build.copy()
        return other

    def score(self) -> Value:
        return self.build.make("load_score")

    def lower(self, expression: Expression, vectors: Vectors, node: Node | None = None) -> Value:
        """The value of an expression's node, its result if None."""
        result = expression.result if node is None else node
        return Nodes(self, expression, vectors).value(result)

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

    def add_leaf(
        self, place: str, source: Tensor, first: bool = False, name: str = ""
    ) -> tuple[int, Any]:
        """The number of a leaf and the bounds of its whole numbers, None of real ones."""
        plain = source.detach()
        real = plain.is_floating_point()
        if not real and plain.dtype not in _WHOLE:
            plain = plain.long()
        bounds = None
        if name:  # known without a look at a device
            bounds = (0, self.sizes.of(name) - 1)
        elif not real:
            low, high = (int(x) for x in plain.aminmax()) if plain.numel() else (0, 0)
            bounds = (low, high)
        if place != "table":
            plain = plain.to(self.wide if real else torch.int32).contiguous()
        self.leaves.append(Leaf(place, source, plain, first, name))
        return len(self.leaves) - 1, bounds


class Nodes:
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
            elif place is None:
                self._values[node] = self._computed(node)
            else:
                self._values[node] = self._of_positions(node) or self._vector(node, place)
        return self._values[node]

    def _of_positions(self, node: Node) -> Value | None:
        """What could be a vector, where it is computed for each pair."""
        if not self.owner.computes_positions or node in self._inputs or not node.varies:
            return None
        if not self.vectors.by_positions(node):
            return None
        try:
            return self._computed(node)
        except CannotCompile:
            return None

    def _vector(self, node: Node, place: str) -> Value:
        source = self.vectors.vector(node)
        number, bounds = self.owner.add_leaf(place, source, name=self._inputs.get(node, ""))
        name = f"load_{place}" + ("" if bounds is None else "_int")
        load = self.build.make(name, bounds=bounds, leaf=number)
        if bounds is None:
            self.owner.loads[load] = self.owner.leaves[number]
        return load

    def _computed(self, node: Node) -> Value:
        name = node.operation.overloadpacket.__name__
        if name in ("index", "select"):
            return self._gather(node)
        rule = self.owner.rules.get(name)
        if rule is None:
            raise CannotCompile(f"calls `{name}`, for which there is no instruction")
        if node.dtype in _HALVES and name not in SAME:
            raise CannotCompile(f"computes in {node.dtype}")
        single = self.owner.wide == torch.float64 and node.dtype == torch.float32
        if single and name not in _EXACT | SAME:
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
