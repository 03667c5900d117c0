"""Gradients of vectors and tables, added up in the order in which the interpreter adds them.

Sums over queries are kept in sixteen numbers, as a vector of the kernels has (`csrc/cpu/vec.h`).
"""

from __future__ import annotations

from .program import Instruction
from .tables import Tables
from .writer import Writer

_LANES = 16
_QUERIES = 64  # of a block


class Sums:
    """The sums of a program."""

    def __init__(self, owner: Writer, tables: Tables) -> None:
        self.owner, self.tables, self.text = owner, tables, owner.text
        self._by_query: list[tuple[Instruction, str]] = []
        self._ones: list[tuple[Instruction, str]] = []

    def write(self, x: Instruction) -> None:
        if x.operation == "sum_table":
            return self._into_table(x)
        value = self.owner.real(x.args[0])
        rules = {"sum_one": self._into_one, "sum_key": self._into_key}
        rules |= {"sum_query": self._into_query, "sum_distance": self._into_distance}
        return rules[x.operation](x, value)

    def finish(self) -> None:
        """What is added up at the end of all keys; written into "exit"."""
        text = self.text
        for x, room in self._ones:
            at = self._gradient(x)
            total = self._sum(room)
            if not text.target.wide:
                total = text.make(f"fpext float {total} to double")
            self._add_to("double", at, total)
        for x, room in self._by_query:
            self._flush(x, room)

    def _gradient(self, x: Instruction) -> str:
        return self.owner.strip.of_leaf(x.leaf, "gradient", "ptr")

    def _add_to(self, scalar: str, at: str, value: str) -> None:
        before = self.text.make(f"load {scalar}, ptr {at}")
        after = self.text.make(f"fadd {scalar} {before}, {value}")
        self.text.line(f"store {scalar} {after}, ptr {at}")

    def _zeros(self, numbers: int, block: str) -> str:
        text = self.text
        room = text.room(f"[{numbers} x {text.scalar}]")
        with text.inside(block):
            for first in range(0, numbers, text.lanes):
                text.store_vector(text.scalar, "zeroinitializer", room, str(first))
        return room

    def _add_vector(self, base: str, place: str, value: str) -> None:
        text = self.text
        before = text.load_vector(text.scalar, base, place)
        text.store_vector(text.scalar, self.owner.formulas.add(before, value), base, place)

    def _into_one(self, x: Instruction, value: str) -> None:
        room = self._zeros(_LANES, "entry")
        self._ones.append((x, room))
        self._add_vector(room, self._lane(), value)

    def _into_key(self, x: Instruction, value: str) -> None:
        text, strip = self.text, self.owner.strip
        room = self._zeros(_LANES, "key")
        self._add_vector(room, self._lane(), value)
        with text.inside("key_end"):
            place = text.make(f"add i64 {strip.field('key')}, %c")
            at = text.address(text.scalar, self._gradient(x), place)
            self._add_to(text.scalar, at, self._sum(room))

    def _into_query(self, x: Instruction, value: str) -> None:
        room = self._zeros(_QUERIES, "entry")
        self._by_query.append((x, room))
        self._add_vector(room, "%q", value)

    def _into_distance(self, x: Instruction, value: str) -> None:
        base = self.text.address(self.text.scalar, self._gradient(x), self.owner.distance)
        self._add_queries(base, value)

    def _lane(self) -> str:
        return self.text.make(f"and i64 %q, {_LANES - 1}")

    def _sum(self, room: str) -> str:
        """Of sixteen numbers: halves are added to each other until one is left."""
        text, lanes = self.text, _LANES
        value = text.load_vector(text.scalar, room, "0", lanes)
        while lanes > 1:
            kind, half = text.vector_of(text.scalar, lanes), lanes // 2
            parts = []
            for first in (0, half):
                chosen = ", ".join(f"i32 {first + n}" for n in range(half))
                parts.append(
                    text.make(
                        f"shufflevector {kind} {value}, {kind} poison, <{half} x i32> <{chosen}>"
                    )
                )
            value = text.make(f"fadd {text.vector_of(text.scalar, half)} {parts[0]}, {parts[1]}")
            lanes = half
        return text.make(f"extractelement {text.vector_of(text.scalar, 1)} {value}, i32 0")

    def _add_queries(self, base: str, value: str, first: str = "%q") -> str:
        """Adds numbers of the queries from `first` on, none past the last, to those of `base`.

        Returns:
            The label of the block that comes after it.
        """
        text, rows = self.text, self.owner.strip.field("rows")
        room = text.room(text.real)
        whole, part, lane, done = (text.name() for _ in range(4))
        end = text.make(f"add i64 {first}, {text.lanes}")
        fits = text.make(f"icmp ule i64 {end}, {rows}")
        text.line(f"br i1 {fits}, label %{whole}, label %{part}")
        text.label(whole)
        self._add_vector(base, first, value)
        text.line(f"br label %{done}")
        text.label(part)
        text.line(f"store {text.real} {value}, ptr {room}")
        some = text.make(f"icmp ult i64 {first}, {rows}")
        text.line(f"br i1 {some}, label %{lane}, label %{done}")
        text.label(lane)
        n, more = f"%{text.name()}", f"%{text.name()}"
        text.line(f"{n} = phi i64 [0, %{part}], [{more}, %{lane}]")
        place = text.make(f"add i64 {first}, {n}")
        self._add_to(
            text.scalar, text.address(text.scalar, base, place), text.load(text.scalar, room, n)
        )
        text.line(f"{more} = add i64 {n}, 1")
        next_place = text.make(f"add i64 {place}, 1")
        again = text.make(f"icmp ult i64 {next_place}, {rows}")
        text.line(f"br i1 {again}, label %{lane}, label %{done}")
        text.label(done)
        return done

    def _flush(self, x: Instruction, room: str) -> None:
        """Adds the sums by query to the gradient."""
        text, strip = self.text, self.owner.strip
        base = text.address(text.scalar, self._gradient(x), strip.field("first"))
        before, loop, done = (text.name() for _ in range(3))
        n, more = f"%{text.name()}", f"%{text.name()}"
        text.line(f"br label %{before}")
        text.label(before)
        text.line(f"br label %{loop}")
        text.label(loop)
        mark = text.mark()
        value = text.load_vector(text.scalar, room, n)
        last = self._add_queries(base, value, n)
        text.line(f"{more} = add i64 {n}, {text.lanes}")
        again = text.make(f"icmp ult i64 {more}, {strip.field('rows')}")
        text.line(f"br i1 {again}, label %{loop}, label %{done}")
        text.label(done)
        text.line_at(mark, f"{n} = phi i64 [0, %{before}], [{more}, %{last}]")

    def _into_table(self, x: Instruction) -> None:
        """Lane by lane: two may meet in one number."""
        text = self.text
        value = self.owner.real(x.out)
        base = self._gradient(x)
        for lane, place in enumerate(self.tables.places(x, "gradient_stride")):
            one = text.make(f"extractelement {text.real} {value}, i32 {lane}")
            self._add_to(text.scalar, text.address(text.scalar, base, place), one)
