"""Instructions for the kernels' interpreter (`csrc/attention/functions.h`), made one by one.

A value is a number for each pair of a query and a key: a real number, or a whole number with its
bounds (truths are 0 and 1). Equal values are made once; constants are folded where that is exact.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime import native

_MOST = 2**31 - 1
TRUTH = (0, 1)


class CannotCompile(Exception):
    """Why the kernels cannot run a function; its text is a reason of `explain`."""


@dataclass(eq=False)
class Value:
    """The result of one instruction.

    Attributes:
        bounds: of a whole number; None of a real one.
        constant: of a constant.
        leaf: the number of the vector or table that is loaded.
        stage: 0 where it is the same for a head, 1 for a block of queries, else 2.
    """

    operation: str
    args: tuple[Value, ...]
    bounds: tuple[int, int] | None
    constant: float
    leaf: int
    stage: int
    number: int

    @property
    def real(self) -> bool:
        return self.bounds is None

    def is_constant(self, value: float) -> bool:
        return self.operation in ("constant", "constant_int") and self.constant == value


_STAGES = {"constant": 0, "constant_int": 0, "load_one": 0, "load_one_int": 0}
_STAGES |= {"load_query": 1, "load_query_int": 1}


class Builder:
    """Makes values; the rules for whole numbers refuse what 32 bits cannot hold."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Value] = {}

    def copy(self) -> Builder:
        """Another with the same values."""
        other = Builder()
        other._made = dict(self._made)
        return other

    def make(
        self,
        operation: str,
        *args: Value,
        bounds: tuple[int, int] | None = None,
        constant: float = 0.0,
        leaf: int = -1,
    ) -> Value:
        key = (operation, *(arg.number for arg in args), struct.pack("d", constant), leaf)
        if key not in self._made:
            if bounds is not None and (bounds[0] < -_MOST or bounds[1] > _MOST):
                raise CannotCompile("has whole numbers beyond 32 bits")
            stage = max((arg.stage for arg in args), default=_STAGES.get(operation, 2))
            number = len(self._made)
            self._made[key] = Value(operation, args, bounds, constant, leaf, stage, number)
        return self._made[key]

    # --- real numbers ---

    def number(self, value: float) -> Value:
        return self.make("constant", constant=float(value))

    def add(self, a: Value, b: Value) -> Value:
        if a.is_constant(0.0):
            return b
        return a if b.is_constant(0.0) else self.make("add", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return a if b.is_constant(0.0) else self.make("sub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        for one, other in ((a, b), (b, a)):
            if one.is_constant(1.0):
                return other
        if a.operation == b.operation == "constant":
            return self.number(a.constant * b.constant)
        return self.make("mul", a, b)

    def neg(self, a: Value) -> Value:
        return self.number(-a.constant) if a.operation == "constant" else self.make("neg", a)

    def select(self, which: Value, yes: Value, no: Value) -> Value:
        if yes is no:
            return yes
        if yes.real:
            return self.make("select", which, yes, no)
        return self.make("select_int", which, yes, no, bounds=_joined(yes, no))

    def compare(self, name: str, a: Value, b: Value) -> Value:
        return self.make(name if a.real else f"{name}_int", a, b, bounds=TRUTH)

    # --- whole numbers ---

    def whole(self, value: int) -> Value:
        return self.make("constant_int", constant=float(value), bounds=(int(value), int(value)))

    def whole_binary(self, name: str, a: Value, b: Value) -> Value:
        (low_a, high_a), (low_b, high_b) = _bounds(a), _bounds(b)
        corners = [(x, y) for x in (low_a, high_a) for y in (low_b, high_b)]
        if name in ("floor_div", "trunc_div", "remainder") and low_b <= 0 <= high_b:
            raise CannotCompile("divides by a whole number that may be 0")
        rules: dict[str, Callable[[], tuple[int, int]]] = {
            "add": lambda: (low_a + low_b, high_a + high_b),
            "sub": lambda: (low_a - high_b, high_a - low_b),
            "mul": lambda: _around(x * y for x, y in corners),
            "max": lambda: (max(low_a, low_b), max(high_a, high_b)),
            "min": lambda: (min(low_a, low_b), min(high_a, high_b)),
            "floor_div": lambda: _around(x // y for x, y in corners),
            "trunc_div": lambda: _around(v for x, y in corners for v in (x // y, -(-x // y))),
            "remainder": lambda: (min(0, low_b + 1), max(0, high_b - 1)),
            **dict.fromkeys(("and", "or", "xor"), lambda: _bits(low_a, high_a, low_b, high_b)),
        }
        return self.make(f"{name}_int", a, b, bounds=rules[name]())

    def whole_unary(self, name: str, a: Value) -> Value:
        low, high = _bounds(a)
        largest = max(abs(low), abs(high))
        bounds = {"neg": (-high, -low), "abs": (0, largest), "sign": (-1, 1)}[name]
        return self.make(f"{name}_int", a, bounds=bounds)

    def truth(self, a: Value) -> Value:
        """a != 0."""
        if a.bounds is not None and a.bounds[0] >= 0 and a.bounds[1] <= 1:
            return a
        return self.compare("ne", a, self.number(0.0) if a.real else self.whole(0))

    def both(self, a: Value | None, b: Value) -> Value:
        return b if a is None else self.whole_binary("and", a, b)

    def detached(self, a: Value) -> Value:
        """The same, without a derivative."""
        return self.make("detached", a, bounds=a.bounds)

    def visible(self) -> Value:
        return self.make("load_visible", bounds=TRUTH)


def _bounds(a: Value) -> tuple[int, int]:
    assert a.bounds is not None
    return a.bounds


def _joined(a: Value, b: Value) -> tuple[int, int]:
    return _around([*_bounds(a), *_bounds(b)])


def _around(values: Iterable[int]) -> tuple[int, int]:
    every = list(values)
    return min(every), max(every)


def _bits(*bounds: int) -> tuple[int, int]:
    """Of whole numbers whose bits are joined."""
    most = (1 << max(abs(x).bit_length() for x in bounds)) - 1
    return (0 if min(bounds) >= 0 else -most - 1), most


@dataclass(frozen=True)
class Sum:
    """Adds a value up into the gradient of a leaf; `load` is what loads the leaf."""

    operation: str
    load: Value
    value: Value

    def indices(self) -> tuple[Value, ...]:
        return self.load.args if self.operation == "sum_table" else ()


def program(
    result: Value | None = None, slope: Value | None = None, sums: Sequence[Sum] = ()
) -> Tensor:
    """The instructions of all that these need, as `_C` reads them (int64, (n, 8))."""
    outputs = [x for x in (result, slope) if x is not None]
    ends = [x for each in sums for x in (each.value, *each.indices())]
    order = sorted(_needed([*outputs, *ends]), key=lambda x: (x.stage, x.number))
    order = [x for x in order if x.operation != "detached"]
    registers = _registers(order, {_source(x) for x in (*outputs, *ends)})
    codes = _codes()
    rows = []
    for x in order:
        args = [registers[_source(arg)] for arg in x.args]
        rows.append(_row(codes[x.operation], registers[x], args, x.leaf, x.constant))
    for each in sums:
        value = registers[_source(each.value)]
        args = [registers[_source(arg)] for arg in each.indices()] or [value]
        rows.append(_row(codes[each.operation], value, args, each.load.leaf))
    used = [{registers[x] for x in order if x.real is real} for real in (True, False)]
    header = [
        sum(x.stage < 1 for x in order),
        sum(x.stage < 2 for x in order),
        len(used[0]),
        len(used[1]),
        -1 if result is None else registers[_source(result)],
        -1 if slope is None else registers[_source(slope)],
    ]
    data = bytearray(struct.pack("8q", *header, 0, 0) + b"".join(rows))
    return torch.frombuffer(data, dtype=torch.int64).view(-1, 8)


def _source(value: Value) -> Value:
    """What is computed for a value: itself, or what it is without a derivative."""
    while value.operation == "detached":
        value = value.args[0]
    return value


def _row(code: int, out: int, args: list[int], leaf: int, constant: float = 0.0) -> bytes:
    return struct.pack("7qd", code, out, *args, *[0] * (4 - len(args)), leaf, constant)


@functools.cache
def _codes() -> dict[str, int]:
    names = native.module().PAIR_OPERATIONS
    return {name: number for number, name in enumerate(names)}


def _needed(outputs: Sequence[Value]) -> set[Value]:
    found: set[Value] = set()
    waiting = list(outputs)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += value.args
    return found


def _registers(order: list[Value], kept: set[Value]) -> dict[Value, int]:
    """Registers of real and of whole numbers; those of the last stage are used again."""
    last: dict[Value, int] = {}
    for place, value in enumerate(order):
        for arg in value.args:
            last[_source(arg)] = place
    free: dict[bool, list[int]] = {True: [], False: []}
    taken = {True: 0, False: 0}
    registers = {}
    for place, value in enumerate(order):
        if free[value.real] and value.stage == 2:
            registers[value] = free[value.real].pop()
        else:
            registers[value] = taken[value.real]
            taken[value.real] += 1
        # After its own: no instruction writes over what it reads.
        for arg in {_source(arg) for arg in value.args}:
            if last[arg] == place and arg.stage == 2 and arg not in kept:
                free[arg.real].append(registers[arg])
    return registers
