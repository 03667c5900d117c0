"""What each instruction is in LLVM's assembly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ....runtime import native
from .program import Instruction
from .writer import Writer

Rule: TypeAlias = "Callable[[Writer, Instruction], str]"


def _binary(operation: str) -> Rule:
    return lambda a, x: a.formulas.binary(operation, a.real(x.args[0]), a.real(x.args[1]))


def _extreme(comparison: str) -> Rule:
    """A NaN of either stays one, as in torch."""

    def rule(a: Writer, x: Instruction) -> str:
        one, other = a.real(x.args[0]), a.real(x.args[1])
        beyond = a.formulas.compare(comparison, one, other)
        nan = a.formulas.compare("uno", one, one)
        first = a.text.make(f"or {a.text.truth} {beyond}, {nan}")
        return a.formulas.select(first, one, other)

    return rule


def _intrinsic(name: str) -> Rule:
    return lambda a, x: a.formulas.intrinsic(name, a.real(x.args[0]))


def _step(name: str) -> Rule:
    """floor, ceil, trunc."""

    def rule(a: Writer, x: Instruction) -> str:
        return (_intrinsic(name) if a.text.target.rounds else _called(name))(a, x)

    return rule


def _called(name: str, args: int = 1) -> Rule:
    """A function of the compiled module (`csrc/attention/machine_calls.h`)."""

    def rule(a: Writer, x: Instruction) -> str:
        text = a.text
        rooms = [text.room(text.real) for _ in range(args)]
        out = text.room(text.real)
        for room, arg in zip(rooms, x.args, strict=False):
            text.line(f"store {text.real} {a.real(arg)}, ptr {room}")
        given = ", ".join(f"ptr {room}" for room in (rooms[0], rooms[-1], out))
        text.line(f"call void {called(name, text.target.wide)}({given}, i64 {text.lanes})")
        # One by one: a vector of numbers just written one by one would wait for the last of them.
        value = "poison"
        for lane in range(text.lanes):
            at = text.address(text.scalar, out, str(lane))
            one = text.make(f"load volatile {text.scalar}, ptr {at}")
            value = text.make(f"insertelement {text.real} {value}, {text.scalar} {one}, i32 {lane}")
        return value

    return rule


def called(name: str, wide: bool) -> str:
    """A function of the compiled module as a constant."""
    address = native.module().MACHINE_CALLS[name][1 if wide else 0]
    return f"inttoptr (i64 {address} to ptr)"


def _sign(a: Writer, x: Instruction) -> str:
    value, zero, one = a.real(x.args[0]), a.text.numbers(0.0), a.text.numbers(1.0)
    above, below = (
        a.formulas.select(a.formulas.compare(name, value, zero), one, zero)
        for name in ("ogt", "olt")
    )
    return a.formulas.sub(above, below)


def _tanh(a: Writer, x: Instruction) -> str:
    if a.text.target.wide:
        return _called("tanh")(a, x)
    return a.formulas.tanh(a.real(x.args[0]))


def _to_float32(a: Writer, x: Instruction) -> str:
    value, text = a.real(x.args[0]), a.text
    if not text.target.wide:
        return value
    single = text.vector_of("float")
    rounded = text.make(f"fptrunc {text.real} {value} to {single}")
    return text.make(f"fpext {single} {rounded} to {text.real}")


def _select(a: Writer, x: Instruction) -> str:
    which, yes, no = x.args[:3]
    return a.formulas.select(a.truth(which), a.real(yes), a.real(no))


CALLED = ("log", "log1p", "expm1", "sin", "cos", "erf", "pow")

REALS: dict[str, Rule] = {
    **{name: _binary(f"f{name}") for name in ("add", "sub", "mul", "div")},
    "constant": lambda a, x: a.text.numbers(x.value),
    "max": _extreme("ogt"),
    "min": _extreme("olt"),
    "neg": lambda a, x: a.text.make(f"fneg {a.text.real} {a.real(x.args[0])}"),
    "abs": _intrinsic("fabs"),
    "sign": _sign,
    "sqrt": _intrinsic("sqrt"),
    **{name: _step(name) for name in ("floor", "ceil", "trunc")},
    "exp": lambda a, x: a.formulas.exp(a.real(x.args[0])),
    "sigmoid": lambda a, x: a.formulas.sigmoid(a.real(x.args[0])),
    "tanh": _tanh,
    **{name: _called(name, 2 if name == "pow" else 1) for name in CALLED},
    "to_float32": _to_float32,
    "from_int": lambda a, x: a.text.make(
        f"sitofp {a.text.whole} {a.whole(x.args[0])} to {a.text.real}"
    ),
    "select": _select,
}

# --- whole numbers; Python has made sure that none overflows and no divisor is 0 ---


def _whole(operation: str) -> Rule:
    return lambda a, x: _of(a, operation, a.whole(x.args[0]), a.whole(x.args[1]))


def _of(a: Writer, operation: str, one: str, other: str) -> str:
    return a.text.make(f"{operation} {a.text.whole} {one}, {other}")


def _below(a: Writer, one: str, other: str, rest: str) -> str:
    """A truth: division rounds to 0 and the floor is one below."""
    zero = "zeroinitializer"
    left = _of(a, "icmp ne", rest, zero)
    first, second = (_of(a, "icmp slt", each, zero) for each in (one, other))
    differ = a.text.make(f"xor {a.text.truth} {first}, {second}")
    return a.text.make(f"and {a.text.truth} {left}, {differ}")


def _floor_div(a: Writer, x: Instruction) -> str:
    one, other = a.whole(x.args[0]), a.whole(x.args[1])
    below = _below(a, one, other, _of(a, "srem", one, other))
    return _of(a, "sub", _of(a, "sdiv", one, other), a.from_truth(below))


def _remainder(a: Writer, x: Instruction) -> str:
    one, other = a.whole(x.args[0]), a.whole(x.args[1])
    rest = _of(a, "srem", one, other)
    below = _below(a, one, other, rest)
    more = a.formulas.select(below, other, a.text.wholes(0), a.text.whole)
    return _of(a, "add", rest, more)


def _whole_extreme(comparison: str) -> Rule:
    def rule(a: Writer, x: Instruction) -> str:
        one, other = a.whole(x.args[0]), a.whole(x.args[1])
        return a.formulas.select(_of(a, comparison, one, other), one, other, a.text.whole)

    return rule


def _neg_int(a: Writer, x: Instruction) -> str:
    return _of(a, "sub", a.text.wholes(0), a.whole(x.args[0]))


def _abs_int(a: Writer, x: Instruction) -> str:
    value = a.whole(x.args[0])
    negative = _of(a, "icmp slt", value, "zeroinitializer")
    return a.formulas.select(negative, _neg_int(a, x), value, a.text.whole)


def _sign_int(a: Writer, x: Instruction) -> str:
    value, zero = a.whole(x.args[0]), "zeroinitializer"
    above, below = (a.from_truth(_of(a, f"icmp {name}", value, zero)) for name in ("sgt", "slt"))
    return _of(a, "sub", above, below)


def _select_int(a: Writer, x: Instruction) -> str:
    which, yes, no = x.args[:3]
    return a.formulas.select(a.truth(which), a.whole(yes), a.whole(no), a.text.whole)


def _compare(name: str) -> Rule:
    def rule(a: Writer, x: Instruction) -> str:
        return a.from_truth(a.formulas.compare(name, a.real(x.args[0]), a.real(x.args[1])))

    return rule


def _compare_int(name: str) -> Rule:
    return lambda a, x: a.from_truth(_whole(f"icmp {name}")(a, x))


_REAL_COMPARISONS = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}
_WHOLE_COMPARISONS = {"lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge", "eq": "eq", "ne": "ne"}

WHOLES: dict[str, Rule] = {
    **{f"{name}_int": _whole(name) for name in ("add", "sub", "mul", "and", "or", "xor")},
    "constant_int": lambda a, x: a.text.wholes(int(x.value)),
    "floor_div_int": _floor_div,
    "trunc_div_int": _whole("sdiv"),
    "remainder_int": _remainder,
    "max_int": _whole_extreme("icmp sgt"),
    "min_int": _whole_extreme("icmp slt"),
    "neg_int": _neg_int,
    "abs_int": _abs_int,
    "sign_int": _sign_int,
    "select_int": _select_int,
    **{name: _compare(of_llvm) for name, of_llvm in _REAL_COMPARISONS.items()},
    **{f"{name}_int": _compare_int(of_llvm) for name, of_llvm in _WHOLE_COMPARISONS.items()},
}
