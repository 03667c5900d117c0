"""From a program's last stage to LLVM's assembly, with the meaning that the interpreter gives it.

The function walks the keys it is given, and for each the queries, `lanes` at a time. What an
instruction gives is a value of LLVM's, in a register as long as that lasts.
"""

from __future__ import annotations

from collections.abc import Sequence

from .formulas import Formulas
from .operations import REALS, WHOLES
from .program import Instruction, Leaf, Program
from .sums import Sums
from .tables import Tables
from .text import Target, Text
from .writer import Strip

_WHOLE_RESULTS = {"lt", "le", "gt", "ge", "eq", "ne", "load_visible"}


def assembly_of(program: Program, leaves: Sequence[Leaf], target: Target, mask: bool) -> str:
    """The text of a module with `void @strip(ptr)`, for a `MachineStrip`.

    Args:
        leaves: all that the program's instructions may name.
        mask: the result is a truth.
    """
    return Assembly(program, leaves, target, mask).text.finished()


class Assembly:
    """Writes one program."""

    def __init__(
        self, program: Program, leaves: Sequence[Leaf], target: Target, mask: bool
    ) -> None:
        self.program, self.leaves = program, leaves
        self.text = text = Text(target)
        self.formulas, self.strip = Formulas(text), Strip(text)
        self.tables = Tables(self)
        self.sums = Sums(self, self.tables)
        self._first = {_register(x): (stage, x) for stage in (0, 1) for x in program.stages[stage]}
        self._values: dict[tuple[str, int], str] = {}
        self._begin()
        for x in program.stages[2]:
            self._write(x)
        if mask:
            self._give_truths()
        else:
            self._give_numbers()
        self.tables.finish()
        self._end()

    # --- the loops: keys %c, queries %q ---

    def _begin(self) -> None:
        text, strip = self.text, self.strip
        with text.inside("key"):
            text.line("%c = phi i64 [0, %entry], [%next_c, %key_end]")
            self.row = text.make(f"mul i64 %c, {strip.field('stride')}")
            self.distance = text.make(f"sub i64 {strip.field('distance')}, %c")
            self.visible = text.make(
                f"and i64 {text.load('i64', strip.field('visible', 'ptr'), '%c')}, "
                f"{strip.field('valid')}"
            )
        text.line("%q = phi i64 [0, %key], [%next_q, %body_end]")

    def _end(self) -> None:
        text, strip = self.text, self.strip
        width, keys = strip.field("width"), strip.field("keys")
        text.line("br label %body_end")
        text.label("body_end")
        text.line(f"%next_q = add i64 %q, {text.lanes}")
        text.line(f"%more_q = icmp ult i64 %next_q, {width}")
        text.line("br i1 %more_q, label %body, label %key_end")
        with text.inside("key_end"):
            text.line("%next_c = add i64 %c, 1")
            text.line(f"%more_c = icmp ult i64 %next_c, {keys}")
            text.line("br i1 %more_c, label %key, label %exit")
        with text.inside("exit"):
            self.sums.finish()
            text.line("ret void")
        for block, after in (("entry", "key"), ("key", "body")):  # last: all add to them
            with text.inside(block):
                text.line(f"br label %{after}")

    # --- values ---

    def real(self, register: int) -> str:
        return self._value("real", register)

    def whole(self, register: int) -> str:
        return self._value("whole", register)

    def _value(self, kind: str, register: int) -> str:
        key = (kind, register)
        if key not in self._values:
            self._values[key] = self._of_an_earlier_stage(kind, register)
        return self._values[key]

    def _of_an_earlier_stage(self, kind: str, register: int) -> str:
        stage, made = self._first[kind, register]
        text = self.text
        if made.operation == "constant":
            return text.numbers(made.value)
        if made.operation == "constant_int":
            return text.wholes(int(made.value))
        scalar = text.scalar if kind == "real" else "i32"
        base = self.strip.field("reals" if kind == "real" else "ints", "ptr")
        with text.inside("entry"):
            start = text.make(f"mul i64 {self.strip.field('register_size')}, {register}")
            first = text.address(scalar, base, start)
            if stage == 0:
                return text.splat(scalar, text.load(scalar, first))
        return text.load_vector(scalar, first, "%q")

    def truth(self, register: int) -> str:
        """A whole number as a truth."""
        whole, zero = self.whole(register), "zeroinitializer"
        return self.text.make(f"icmp ne {self.text.whole} {whole}, {zero}")

    def from_truth(self, truth: str) -> str:
        return self.text.make(f"zext {self.text.truth} {truth} to {self.text.whole}")

    def _write(self, x: Instruction) -> None:
        name = x.operation
        if name.startswith("sum_"):
            self.sums.write(x)
            return
        if name in REALS:
            value = REALS[name](self, x)
        elif name in WHOLES:
            value = WHOLES[name](self, x)
        elif name.startswith("gather"):
            value = self.tables.gather(x)
        else:
            value = self._load(x)
        self._values[_register(x)] = value

    def _load(self, x: Instruction) -> str:
        text, strip = self.text, self.strip
        whole = x.operation.endswith("_int")
        scalar = "i32" if whole else text.scalar
        name = x.operation.removesuffix("_int")
        if name == "load_key":
            with text.inside("key"):
                base = text.address(
                    scalar, strip.of_leaf(x.leaf, "vector", "ptr"), strip.field("key")
                )
                return text.splat(scalar, text.load(scalar, base, "%c"))
        if name == "load_distance":
            base = text.address(scalar, strip.of_leaf(x.leaf, "vector", "ptr"), self.distance)
            return self._queries_of(scalar, base)
        if name == "load_visible":
            moved = text.make(f"lshr i64 {self.visible}, %q")
            bits = text.make(f"trunc i64 {moved} to i{text.lanes}")
            return self.from_truth(text.make(f"bitcast i{text.lanes} {bits} to {text.truth}"))
        tile = {"load_score": "scores", "load_gradient": "gradient"}[name]
        loaded = text.load_vector(
            scalar, text.address(scalar, strip.field(tile, "ptr"), self.row), "%q"
        )
        return loaded if tile == "gradient" else self.formulas.mul(loaded, self._scale())

    def _scale(self) -> str:
        text, scale = self.text, self.strip.field("scale", "double")
        with text.inside("entry"):
            if not text.target.wide:
                scale = text.make(f"fptrunc double {scale} to float")
            return text.splat(text.scalar, scale)

    def _queries_of(self, scalar: str, base: str) -> str:
        """The numbers of the queries at %q from a vector; past the last query its number again."""
        text, rows = self.text, self.strip.field("rows")
        kind = text.vector_of(scalar)
        room = text.room(kind)
        whole, part, lane, done = (text.name() for _ in range(4))
        end = text.make(f"add i64 %q, {text.lanes}")
        fits = text.make(f"icmp ule i64 {end}, {rows}")
        text.line(f"br i1 {fits}, label %{whole}, label %{part}")
        text.label(whole)
        fast = text.load_vector(scalar, base, "%q")
        text.line(f"br label %{done}")
        text.label(part)
        last = text.make(f"sub i64 {rows}, 1")
        text.line(f"br label %{lane}")
        text.label(lane)
        n, more = f"%{text.name()}", f"%{text.name()}"
        text.line(f"{n} = phi i64 [0, %{part}], [{more}, %{lane}]")
        wanted = text.make(f"add i64 %q, {n}")
        inside = text.make(f"icmp ult i64 {wanted}, {last}")
        place = text.make(f"select i1 {inside}, i64 {wanted}, i64 {last}")
        to = text.address(scalar, room, n)
        text.line(f"store {scalar} {text.load(scalar, base, place)}, ptr {to}")
        text.line(f"{more} = add i64 {n}, 1")
        ends = text.make(f"icmp eq i64 {more}, {text.lanes}")
        gathered = f"{part}_end"
        text.line(f"br i1 {ends}, label %{gathered}, label %{lane}")
        text.label(gathered)
        slow = text.make(f"load {kind}, ptr {room}")
        text.line(f"br label %{done}")
        text.label(done)
        return text.make(f"phi {kind} [{fast}, %{whole}], [{slow}, %{gathered}]")

    def _give_numbers(self) -> None:
        text, strip, program = self.text, self.strip, self.program
        for name, register in (("result", program.result), ("slope", program.slope)):
            if register >= 0:
                row = text.address(text.scalar, strip.field(name, "ptr"), self.row)
                text.store_vector(text.scalar, self.real(register), row, "%q")

    def _give_truths(self) -> None:
        text = self.text
        word = text.room("i64")
        with text.inside("key"):
            text.line(f"store i64 0, ptr {word}")
        bits = text.make(f"bitcast {text.truth} {self.truth(self.program.result)} to i{text.lanes}")
        moved = text.make(f"shl i64 {text.make(f'zext i{text.lanes} {bits} to i64')}, %q")
        joined = text.make(f"or i64 {text.make(f'load i64, ptr {word}')}, {moved}")
        text.line(f"store i64 {joined}, ptr {word}")
        with text.inside("key_end"):
            at = text.address("i64", self.strip.field("truths", "ptr"), "%c")
            text.line(f"store i64 {text.make(f'load i64, ptr {word}')}, ptr {at}")


def _register(x: Instruction) -> tuple[str, int]:
    name = x.operation
    whole = name in _WHOLE_RESULTS or (name.endswith("_int") and name != "from_int")
    return ("whole" if whole else "real", x.out)
