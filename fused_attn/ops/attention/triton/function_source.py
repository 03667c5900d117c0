"""Triton source of functions of pairs: two jitted helpers that the kernels inline.

`load_pairs` brings all that comes from memory, and is called before a tile's q k^T (`load_terms`
says why); `change_pairs` computes the changed score, where it is hidden, and its slope. Both are
text that is written value by value, and compiled once for equal text.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import types
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..functions import PairFunctions, Value
from . import function_math

# What the text calls is part of what a kernel's name has to tell: Triton keeps kernels by it.
_MATH = Path(function_math.__file__).read_bytes()
_INT32 = 1 << 31
_MAX = "propagate_nan=tl.PropagateNan.ALL"
# What an operation is of its arguments.
_TEXTS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "max": f"tl.maximum({{0}}, {{1}}, {_MAX})", "min": f"tl.minimum({{0}}, {{1}}, {_MAX})",
    "neg": "-{0}", "abs": "tl.abs({0})", "sign": "fm.sign({0})", "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})", "trunc": "fm.trunc({0})", "sqrt": "tl.sqrt_rn({0})",
    "exp": "tl.exp({0})", "log": "tl.log({0})", "log1p": "fm.log1p({0})",
    "expm1": "fm.expm1({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})",
    "tanh": "fm.tanh({0})", "sigmoid": "tl.sigmoid({0})", "erf": "tl.erf({0})",
    "to_float32": "{0}", "from_int": "{0}.to(tl.float32)",
    "add_int": "{0} + {1}", "sub_int": "{0} - {1}", "mul_int": "{0} * {1}",
    "trunc_div_int": "{0} // {1}", "max_int": "tl.maximum({0}, {1})",
    "min_int": "tl.minimum({0}, {1})", "neg_int": "-{0}", "abs_int": "tl.abs({0})",
    "sign_int": "fm.sign({0})", "and_int": "{0} & {1}", "or_int": "{0} | {1}",
    "xor_int": "{0} ^ {1}",
}  # fmt: skip
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_BITS = ("and_int", "or_int", "xor_int")
_INPUTS = {"b": "batch", "h": "head", "q_idx": "row", "kv_idx": "col"}
# What of a tile each vector takes a number for.
_PLACES = {"query": "row", "key": "col", "distance": "row - col + (sequence.len_k - 1)"}
_OF_KEYS = ("key", "distance")


class Helpers(NamedTuple):
    """The jitted functions of one text; equal texts have the same."""

    load: Any
    change: Any
    load_seen: Any  # where all of a tile is known to be seen: without the mask
    change_seen: Any
    pressure: int  # how many operands they count for where registers are scarce


def helpers(functions: PairFunctions, slope: Value | None) -> Helpers:
    """Helpers of the functions, with the derivative of the score that is called for.

    Args:
        slope: what the gradient of the changed score is multiplied by; None: nothing.
    """
    text = _Text(functions, slope)
    load, change = seen = _compiled(text.source())
    if functions.mask is not None or functions.kinds is not None:
        seen = _compiled(_Text(functions._replace(mask=None, kinds=None), slope).source())
    return Helpers(load, change, *seen, text.pressure())


@functools.cache  # a call finds its own again, and Triton what it compiled for them
def _compiled(source: str) -> tuple[Any, Any]:
    """The functions that a text defines; inspect, and so Triton, finds it by linecache."""
    digest = hashlib.sha256(source.encode() + _MATH).hexdigest()[:16]
    source = source.replace("_pairs(", f"_pairs_{digest}(")
    name = f"fused_attn_functions_{digest}"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    module.__dict__.update(triton=triton, tl=tl, fm=function_math, __file__=file)
    exec(compile(source, file, "exec"), module.__dict__)
    load = getattr(module, f"load_pairs_{digest}")
    return load, getattr(module, f"change_pairs_{digest}")


class _Text:
    """Writes both helpers."""

    def __init__(self, functions: PairFunctions, slope: Value | None) -> None:
        self.functions = functions
        self.slope = slope
        self.goals = [x for x in (functions.mask, functions.score, slope) if x is not None]
        self.order = _ordered(self.goals)
        self.names = {value: f"v{n}" for n, value in enumerate(self.order)}
        # What the score has no part in can be loaded beforehand.
        late: set[Value] = set()
        for value in self.order:
            if value.operation == "load_score" or any(arg in late for arg in value.args):
                late.add(value)
        loads = [x for x in self.order if _is_load(x, functions.leaves)]
        self.early = [x for x in loads if x not in late]
        self.tiles = sum(_loads_tile(x, functions.leaves) for x in loads)

    def pressure(self) -> int:
        """1 for a few comparisons; 2 for what computes with scores or loads a tile."""
        return 1 if self.functions.score is None and self.tiles == 0 else 2

    def source(self) -> str:
        parameters = "m0, n0, row, col, sequence, head, pairs, INSIDE: tl.constexpr, "
        before = _Code(self, set())
        for value in _ordered(self.early):
            before.write(value)
        given = [self.names[x] for x in self.early] + before.wrong
        if self.functions.kinds is not None:
            before.lines.append(
                "kind = fm.kind_of(pairs.kinds, m0, n0, row, col, sequence, head, UNIFORM)"
            )
            given.append("kind")
        after = _Code(self, set(self.early))
        after.wrong += before.wrong
        for value in _ordered(self.goals, after.known):
            after.write(value)
        return "\n".join([
            "@triton.jit",
            f"def load_pairs({parameters}UNIFORM: tl.constexpr):",
            *_indented([*_START, *before.lines, f"return {_tuple(given)}"]),
            "",
            "",
            "@triton.jit",
            f"def change_pairs(score, loaded, {parameters.removesuffix(', ')}):",
            *_indented([*_START, f"{_tuple(given)} = loaded" if given else "", *after.lines]),
            *_indented(self._end(after)),
            "",
        ])  # fmt: skip

    def _end(self, code: _Code) -> list[str]:
        """Score and slope; what is hidden, and NaN where an index leaves its table."""
        score, mask = self.functions.score, self.functions.mask
        lines = ["changed = score"]
        if score is not None:
            lines = [f"changed = tl.zeros_like(score) + {self.names[_source(score)]}"]
        if mask is not None or self.functions.kinds is not None:
            shown = "kind != 0" if mask is None else code.truth(mask)
            if mask is not None and self.functions.kinds is not None:
                shown = f"(kind == 2) | ((kind != 0) & {shown})"
            lines.append(f'changed = tl.where({shown}, changed, -float("inf"))')
        lines += [f'changed = tl.where({w}, float("nan"), changed)' for w in code.wrong]
        slope = "1.0" if self.slope is None else self.names[_source(self.slope)]
        return [*lines, f"return changed, {slope}"]


_START = [
    "batch = sequence.batch",
    "row = tl.minimum(row, sequence.len_q - 1)",
    "inside = col < sequence.len_k",
]


class _Code:
    """Lines that compute values, each under its name."""

    def __init__(self, text: _Text, known: set[Value]) -> None:
        self.names, self.leaves = text.names, text.functions.leaves
        self.known = known
        self.lines: list[str] = []
        self.wrong: list[str] = []  # names of tiles that say where an index left its table

    def write(self, value: Value) -> None:
        if value not in self.known and value.operation != "detached":
            self.lines.append(f"{self.names[value]} = {self._text(value)}")

    def name(self, value: Value) -> str:
        return self.names[_source(value)]

    def truth(self, value: Value) -> str:
        return self.name(value) if _is_truth(value) else f"({self.name(value)} != 0)"

    def number(self, value: Value) -> str:
        return f"{self.name(value)}.to(tl.int32)" if _is_truth(value) else self.name(value)

    def _text(self, value: Value) -> str:
        operation, args = value.operation, value.args
        if operation == "constant":
            return f"tl.full((), {_literal(value.constant)}, tl.float32)"
        if operation == "constant_int":
            return f"tl.full((), {int(value.constant)}, tl.int32)"
        if operation == "load_score":
            return "score"
        if operation.startswith("load_"):
            return self._vector(value)
        if operation.startswith("gather"):
            return self._gather(value)
        if operation == "pow":
            return _power(self.name(args[0]), args[1].constant)
        if operation in ("select", "select_int"):
            yes, no = (self.number(x) for x in args[1:])
            return f"tl.where({self.truth(args[0])}, {yes}, {no})"
        if operation in ("floor_div_int", "remainder_int"):
            return self._division(value)
        comparison = _COMPARISONS.get(operation.removesuffix("_int"))
        if comparison is not None:
            return f"{self.number(args[0])} {comparison} {self.number(args[1])}"
        plain = operation in _BITS and _is_truth(value)
        return _TEXTS[operation].format(*map(self.name if plain else self.number, args))

    def _division(self, value: Value) -> str:
        a, b = value.args
        below = min(a.bounds[0], b.bounds[0]) < 0
        x, y = self.number(a), self.number(b)
        if value.operation == "remainder_int":
            return f"fm.remainder({x}, {y})" if below else f"{x} % {y}"
        return f"fm.floor_div({x}, {y})" if below else f"{x} // {y}"

    def _vector(self, value: Value) -> str:
        leaf = self.leaves[value.leaf]
        if leaf.name:
            return _INPUTS[leaf.name]
        view = f"pairs.leaves[{value.leaf}]"
        pointers = f"{view}.ptr + batch.to(tl.int64) * ({view}.strides[0] >> 8)"
        pointers += f" + head.to(tl.int64) * ({view}.strides[1] >> 8)"
        if leaf.place in _PLACES:
            pointers += f" + ({_PLACES[leaf.place]})"
        if leaf.place in _OF_KEYS:
            return f"fm.take({pointers}, inside, INSIDE)"
        return f"tl.load({pointers})"

    def _gather(self, value: Value) -> str:
        """A number of a table; where an index leaves it, NaN or a mark that makes one."""
        number, table = value.leaf, self.leaves[value.leaf].tensor
        view = f"pairs.leaves[{number}]"
        wide = _span(table) >= _INT32
        offsets, outside = [], []
        for d, index in enumerate(value.args):
            name, size = self.number(index), f"({view}.sizes[{d}] >> 8)"
            low, high = index.bounds
            if high < 0:
                name = f"({name} + {size})"
            elif low < 0:
                name = f"tl.where({name} < 0, {name} + {size}, {name})"
            if low < -table.shape[d] or high >= table.shape[d]:
                place = f"{self.names[value]}_{d}"
                self.lines.append(f"{place} = {name}")
                outside.append(f"({place} < 0) | ({place} >= {size})")
                name = f"tl.minimum(tl.maximum({place}, 0), {size} - 1)"
            wide_name = f"({name}){'.to(tl.int64)' if wide else ''}"
            dense = table.stride(d) == 1  # which the compiler has to know, to load many at once
            offsets.append(wide_name if dense else f"{wide_name} * ({view}.strides[{d}] >> 8)")
        pointers = f"{view}.ptr + ({' + '.join(offsets)})" if offsets else f"{view}.ptr"
        kind = "tl.float32" if value.bounds is None else "tl.int32"
        by_key = any(_by_key(index, self.leaves) for index in value.args)
        loaded = f"fm.take({pointers}, inside, INSIDE)" if by_key else f"tl.load({pointers})"
        if outside:
            wrong = f"{self.names[value]}_outside"
            test = " | ".join(f"({each})" for each in outside)
            self.lines.append(f"{wrong} = ({test}) & inside")
            self.wrong.append(wrong)
        return f"{loaded}.to({kind})"


def _ordered(goals: Iterable[Value], known: Collection[Value] = ()) -> list[Value]:
    """All that these need, arguments first; not what is known, nor what that needs."""
    found: set[Value] = set()
    waiting = list(goals)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += value.args if value not in known else ()
    return sorted(found, key=lambda x: x.number)


def _source(value: Value) -> Value:
    while value.operation == "detached":
        value = value.args[0]
    return value


def _literal(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return f'float("{value}")'


def _is_truth(value: Value) -> bool:
    """Whether its name stands for truths in place of whole numbers."""
    value = _source(value)
    if value.operation in _BITS:
        return all(map(_is_truth, value.args))
    return value.operation.removesuffix("_int") in _COMPARISONS


def loads_of(value: Value) -> list[Value]:
    """All of which a value is made that comes from a leaf."""
    return [x for x in _ordered([value]) if x.leaf >= 0]


def _is_load(value: Value, leaves: Sequence[Any]) -> bool:
    loads = value.operation.startswith(("load_", "gather")) and value.operation != "load_score"
    return loads and not leaves[value.leaf].name


def _loads_tile(value: Value, leaves: Sequence[Any]) -> bool:
    """Whether a number is loaded for each pair."""
    place = leaves[value.leaf].place
    if place != "table":
        return place == "distance"
    ways = {_by_key(value, leaves), _by_query(value, leaves)}
    return ways == {True}


def _by_key(value: Value, leaves: Sequence[Any]) -> bool:
    return _along(value, leaves, _OF_KEYS)


def _by_query(value: Value, leaves: Sequence[Any]) -> bool:
    return _along(value, leaves, ("query", "distance"))


def _along(value: Value, leaves: Sequence[Any], places: tuple[str, ...]) -> bool:
    """Whether a vector along one of these is among what it is made of."""
    return any(
        x.operation.startswith("load_") and x.leaf >= 0 and leaves[x.leaf].place in places
        for x in _ordered([value])
    )


def _span(table: Tensor) -> int:
    """Elements from the first to the last."""
    steps = zip(table.shape, table.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in steps)


def _power(base: str, exponent: float) -> str:
    whole, half = divmod(exponent, 1.0)
    if abs(exponent) <= 16 and half in (0.0, 0.5):
        factors = [base] * abs(int(whole))
        if half:
            factors = [base] * abs(int(whole if exponent > 0 else whole + 1))
            factors.append(f"tl.sqrt_rn({base})")
        text = " * ".join(factors) or f"tl.zeros_like({base}) + 1.0"
        return text if exponent > 0 or not factors else f"1.0 / ({text})"
    if half == 0.0:
        return f"fm.power_of_either_sign({base}, {exponent!r}, {whole % 2 == 1})"
    return f"fm.power({base}, {exponent!r})"


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)},)" if names else "0"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines if line]
