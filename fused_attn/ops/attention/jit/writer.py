"""What those who write instructions know of whoever writes the whole program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ....runtime import native
from .formulas import Formulas
from .program import Leaf
from .text import Text


class Strip:
    """What code is given, by its fields' names."""

    def __init__(self, text: Text) -> None:
        self.text = text
        layout = native.module().MACHINE_LAYOUT
        self._fields = _offsets(layout["strip"])
        self._leaf, self._leaf_words = _offsets(layout["leaf"]), sum(n for _, n in layout["leaf"])
        self._loaded: dict[tuple[str, int, int], str] = {}

    def place(self, name: str) -> str:
        """Address of a field."""
        return self.text.address("i64", "%strip", str(self._fields[name]))

    def field(self, name: str, scalar: str = "i64") -> str:
        return self._once((name, -1, 0), scalar, "%strip", self._fields[name])

    def of_leaf(self, leaf: int, name: str, scalar: str = "i64", number: int = 0) -> str:
        word = leaf * self._leaf_words + self._leaf[name] + number
        return self._once((name, leaf, number), scalar, self.field("leaves", "ptr"), word)

    def _once(self, key: tuple[str, int, int], scalar: str, base: str, word: int) -> str:
        if key not in self._loaded:
            with self.text.inside("entry"):
                at = self.text.address("i64", base, str(word))
                self._loaded[key] = self.text.make(f"load {scalar}, ptr {at}")
        return self._loaded[key]


def _offsets(fields: Sequence[tuple[str, int]]) -> dict[str, int]:
    """First words of fields of so many words."""
    found, at = {}, 0
    for name, words in fields:
        found[name] = at
        at += words
    return found


class Writer(Protocol):
    """The values of a program: registers as LLVM's names.

    Attributes:
        distance: the place of (query %q - key %c) less %q in a vector by distance.
    """

    text: Text
    formulas: Formulas
    strip: Strip
    leaves: Sequence[Leaf]
    distance: str

    def real(self, register: int) -> str:
        """A vector of real numbers."""

    def whole(self, register: int) -> str:
        """A vector of whole numbers."""

    def truth(self, register: int) -> str:
        """A whole number as a truth."""

    def from_truth(self, truth: str) -> str:
        """A truth as a whole number."""
