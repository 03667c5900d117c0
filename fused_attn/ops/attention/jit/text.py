"""The text of LLVM's assembly, block by block, over vectors of `lanes` numbers."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# In the order in which they stand; "body" runs for the queries of a key, "key" before them.
BLOCKS = ("entry", "key", "body", "key_end", "exit")


@dataclass(frozen=True)
class Target:
    """What code is written for.

    Attributes:
        vector_bytes: of a vector register.
        wide: real numbers are float64, else float32.
        fused: products and sums that the kernels fuse are rounded once.
        rounds: there are instructions for floor, ceil and trunc.
        halves: there are instructions that widen float16.
    """

    vector_bytes: int
    wide: bool
    fused: bool
    rounds: bool
    halves: bool

    @property
    def lanes(self) -> int:
        return max(4, self.vector_bytes // (8 if self.wide else 4))


class Text:
    """Lines of one function `void @strip(ptr %strip)`.

    Values are LLVM's names, or constants as they are written there.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.lanes = target, target.lanes
        self.scalar = "double" if target.wide else "float"
        self.real = self.vector_of(self.scalar)
        self.whole, self.truth = self.vector_of("i32"), self.vector_of("i1")
        self._lines: dict[str, list[str]] = {name: [] for name in BLOCKS}
        self._at = "body"
        self._names = 0
        self._declared: set[str] = set()

    def vector_of(self, scalar: str, lanes: int | None = None) -> str:
        return f"<{lanes or self.lanes} x {scalar}>"

    @contextlib.contextmanager
    def inside(self, block: str) -> Iterator[None]:
        """What is written within this stands in another block."""
        before, self._at = self._at, block
        try:
            yield
        finally:
            self._at = before

    def name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def make(self, text: str) -> str:
        """The name of what an instruction gives."""
        name = f"%{self.name()}"
        self.line(f"{name} = {text}")
        return name

    def line(self, text: str) -> None:
        self._lines[self._at].append(f"  {text}")

    def mark(self) -> int:
        """Where the next line goes, for `line_at`."""
        return len(self._lines[self._at])

    def line_at(self, mark: int, text: str) -> None:
        """A line that can be written only after those below it."""
        self._lines[self._at].insert(mark, f"  {text}")

    def label(self, name: str) -> None:
        self._lines[self._at].append(f"{name}:")

    def call(self, function: str, result: str, *args: tuple[str, str]) -> str:
        """One of LLVM's own functions; args: type and value."""
        types = ", ".join(kind for kind, _ in args)
        self._declared.add(f"declare {result} @{function}({types})")
        given = ", ".join(f"{kind} {value}" for kind, value in args)
        return self.make(f"call {result} @{function}({given})")

    def room(self, kind: str) -> str:
        """Memory of the function's own."""
        with self.inside("entry"):
            return self.make(f"alloca {kind}, align 64")

    # --- numbers ---

    def number(self, value: float, scalar: str | None = None) -> str:
        """A constant of one real number."""
        if (scalar or self.scalar) == "float":
            value = float32(value)
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"

    def numbers(self, value: float) -> str:
        """A constant vector of real numbers."""
        return self._repeated(self.scalar, self.number(value))

    def wholes(self, value: int, scalar: str = "i32") -> str:
        return self._repeated(scalar, str(int(value)))

    def _repeated(self, scalar: str, constant: str) -> str:
        return f"<{', '.join([f'{scalar} {constant}'] * self.lanes)}>"

    def splat(self, scalar: str, value: str) -> str:
        kind = self.vector_of(scalar)
        one = self.make(f"insertelement {kind} poison, {scalar} {value}, i32 0")
        mask = self.vector_of("i32")
        return self.make(f"shufflevector {kind} {one}, {kind} poison, {mask} zeroinitializer")

    # --- memory ---

    def address(self, scalar: str, base: str, place: str) -> str:
        return self.make(f"getelementptr {scalar}, ptr {base}, i64 {place}")

    def load(self, scalar: str, base: str, place: str = "0") -> str:
        return self.make(f"load {scalar}, ptr {self.address(scalar, base, place)}")

    def load_vector(self, scalar: str, base: str, place: str, lanes: int | None = None) -> str:
        at = self.address(scalar, base, place)
        return self.make(f"load {self.vector_of(scalar, lanes)}, ptr {at}, align {_bytes(scalar)}")

    def store_vector(self, scalar: str, value: str, base: str, place: str) -> None:
        at = self.address(scalar, base, place)
        self.line(f"store {self.vector_of(scalar)} {value}, ptr {at}, align {_bytes(scalar)}")

    def finished(self) -> str:
        """The whole module."""
        body = "\n".join(line for name in BLOCKS for line in [f"{name}:", *self._lines[name]])
        bits = 8 * max(self.target.vector_bytes, 16)
        attributes = (
            'nounwind "no-builtins" "no-stack-arg-probe" '
            f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        )
        declared = "\n".join(sorted(self._declared))
        return (
            f"{declared}\ndefine void @strip(ptr %strip) #0 {{\n{body}\n}}\n"
            f"attributes #0 = {{ {attributes} }}\n"
        )


def float32(value: float) -> float:
    """The nearest."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _bytes(scalar: str) -> int:
    return {"double": 8, "float": 4, "half": 2}.get(scalar) or int(scalar[1:]) // 8
