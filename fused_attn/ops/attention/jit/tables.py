"""Numbers from tables, place by place, and sums into them."""

from __future__ import annotations

from .operations import called
from .program import Instruction
from .writer import Writer

# What stands in memory, by torch's names of dtypes.
_STORED = {"float32": "float", "float64": "double", "float16": "i16", "bfloat16": "i16"}
_STORED |= {"bool": "i8", "int32": "i32", "int64": "i64"}


class Tables:
    """The gathers of a program; an index that leaves its table is noted, and counts as 0."""

    def __init__(self, owner: Writer) -> None:
        self.owner, self.text = owner, owner.text
        self._outside: str | None = None

    def gather(self, x: Instruction) -> str:
        text, strip = self.text, self.owner.strip
        dtype = self.owner.leaves[x.leaf].dtype
        stored = _STORED[dtype]
        base, kind = strip.of_leaf(x.leaf, "table", "ptr"), text.vector_of(stored)
        loaded = "poison"
        for lane, place in enumerate(self.places(x, "stride")):
            one = text.load(stored, base, place)
            loaded = text.make(f"insertelement {kind} {loaded}, {stored} {one}, i32 {lane}")
        return self._as_register(loaded, dtype)

    def _as_register(self, loaded: str, dtype: str) -> str:
        """As a vector of real or of whole numbers."""
        text = self.text
        if dtype == "bool":
            return text.make(f"zext {text.vector_of('i8')} {loaded} to {text.whole}")
        if dtype == "int64":
            return text.make(f"trunc {text.vector_of('i64')} {loaded} to {text.whole}")
        if dtype == "int32":
            return loaded
        if dtype in ("float16", "bfloat16"):
            loaded = self._widened(loaded, dtype)
            dtype = "float32"
        if (dtype == "float64") == text.target.wide:
            return loaded
        change = "fpext" if text.target.wide else "fptrunc"
        return text.make(f"{change} {text.vector_of(_STORED[dtype])} {loaded} to {text.real}")

    def _widened(self, bits: str, dtype: str) -> str:
        """Numbers of 16 bits as float32."""
        text = self.text
        half, single = text.vector_of("i16"), text.vector_of("float")
        if dtype == "bfloat16":
            long = text.make(f"zext {half} {bits} to {text.whole}")
            moved = text.make(f"shl {text.whole} {long}, {text.wholes(16)}")
            return text.make(f"bitcast {text.whole} {moved} to {single}")
        if text.target.halves:
            halves = text.vector_of("half")
            return text.make(
                f"fpext {halves} {text.make(f'bitcast {half} {bits} to {halves}')} to {single}"
            )
        given, found = text.room(half), text.room(single)
        text.line(f"store {half} {bits}, ptr {given}")
        text.line(f"call void {called('half', False)}(ptr {given}, ptr {found}, i64 {text.lanes})")
        return text.make(f"load {single}, ptr {found}")

    def places(self, x: Instruction, strides: str) -> list[str]:
        """Where each lane's number stands (i64), by the indices that an instruction has."""
        text = self.text
        leaf = self.owner.leaves[x.leaf]
        scalar = "i32" if leaf.narrow else "i64"
        kind = text.vector_of(scalar)
        total: str | None = None
        for d in range(leaf.dims):
            index = self._inside(x, d, scalar)
            stride = self._spread(x.leaf, strides, d, scalar)
            part = text.make(f"mul {kind} {index}, {stride}")
            total = part if total is None else text.make(f"add {kind} {total}, {part}")
        if total is None:
            total = "zeroinitializer"
        found = []
        for lane in range(text.lanes):
            place = text.make(f"extractelement {kind} {total}, i32 {lane}")
            found.append(place if scalar == "i64" else text.make(f"zext i32 {place} to i64"))
        return found

    def _inside(self, x: Instruction, d: int, scalar: str) -> str:
        """An index counted from the front, 0 where that leaves the table."""
        text, kind = self.text, self.text.vector_of(scalar)
        index, zero = self.owner.whole(x.args[d]), "zeroinitializer"
        if scalar == "i64":
            index = text.make(f"sext {text.whole} {index} to {kind}")
        size = self._spread(x.leaf, "size", d, scalar)
        negative = text.make(f"icmp slt {kind} {index}, {zero}")
        moved = text.make(f"add {kind} {index}, {size}")
        index = self.owner.formulas.select(negative, moved, index, kind)
        inside = text.make(f"icmp ult {kind} {index}, {size}")
        self._note(inside)
        return self.owner.formulas.select(inside, index, zero, kind)

    def _spread(self, leaf: int, field: str, d: int, scalar: str) -> str:
        """A size or a stride of a leaf, in all lanes."""
        text = self.text
        value = self.owner.strip.of_leaf(leaf, field, "i64", d)
        with text.inside("entry"):
            if scalar == "i32":
                value = text.make(f"trunc i64 {value} to i32")
            return text.splat(scalar, value)

    def _note(self, inside: str) -> None:
        text = self.text
        if self._outside is None:
            self._outside = text.room(text.whole)
            with text.inside("entry"):
                text.line(f"store {text.whole} zeroinitializer, ptr {self._outside}")
        wrong = text.make(f"xor {text.truth} {inside}, {_ones(text.lanes)}")
        before = text.make(f"load {text.whole}, ptr {self._outside}")
        joined = text.make(f"or {text.whole} {before}, {self.owner.from_truth(wrong)}")
        text.line(f"store {text.whole} {joined}, ptr {self._outside}")

    def finish(self) -> None:
        """Says at the end whether an index was outside."""
        if self._outside is None:
            return
        text = self.text
        with text.inside("exit"):
            noted = text.make(f"load {text.whole}, ptr {self._outside}")
            wrong = text.make(f"icmp ne {text.whole} {noted}, zeroinitializer")
            bits = text.make(f"bitcast {text.truth} {wrong} to i{text.lanes}")
            some = text.make(f"icmp ne i{text.lanes} {bits}, 0")
            at = self.owner.strip.place("outside")
            text.line(f"store i64 {text.make(f'zext i1 {some} to i64')}, ptr {at}")


def _ones(lanes: int) -> str:
    return f"<{', '.join(['i1 true'] * lanes)}>"
