"""What a random call is made of: named choices, of which the first is the simplest."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Case = dict[str, Any]  # a choice for each field; goes to JSON and back unchanged


class Field(NamedTuple):
    """One choice.

    Attributes:
        choices: numbers, strings, booleans, None, or lists of numbers; the first is the simplest.
        simple: how often the simplest is taken at once.
    """

    choices: tuple[Any, ...]
    simple: float = 0.0


Fields = Mapping[str, Field]
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LENGTHS = (1, 0, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200)


def layout(simple: float = 0.5) -> Field:
    """How a tensor lies in memory."""
    return Field(LAYOUTS, simple)


def flag(often: float) -> Field:
    return Field((False, True), 1.0 - often)


def maybe(often: float, *choices: Any) -> Field:
    """None, or one of these."""
    return Field((None, *choices), 1.0 - often)


def draw(fields: Fields, seed: int) -> Case:
    """The case of a seed: the same on every machine."""
    source = random.Random(seed)
    case: Case = {"seed": seed}
    for name, field in fields.items():
        first, *rest = field.choices
        simple = not rest or source.random() < field.simple
        pool = (first,) if simple else (tuple(rest) if field.simple else field.choices)
        case[name] = source.choice(pool)
    return case


def expect(case: Mapping[str, Any], fields: Fields) -> Case:
    """The case, checked: for one that somebody wrote down.

    Raises:
        ValueError: a field is missing or unknown.
    """
    wrong = sorted({"seed", *fields} ^ case.keys())
    if wrong:
        raise ValueError(
            f"the case has other fields than this version's: {', '.join(wrong)}; it was written "
            f"down by another version"
        )
    return dict(case)


def shrink(case: Case, fields: Fields, fails: Callable[[Case], bool], rounds: int = 200) -> Case:
    """A simpler case that still fails: field after field its simplest choice, or a smaller number.

    Args:
        rounds: how many cases are tried at most.
    """
    tried = 0
    changed = True
    while changed:
        changed = False
        for name, field in fields.items():
            for simpler in _simpler(case[name], field):
                if tried == rounds:
                    return case
                tried += 1
                smaller = {**case, name: simpler}
                if fails(smaller):
                    case, changed = smaller, True
                    break
    return case


def _simpler(value: Any, field: Field) -> list[Any]:
    """What to try in the place of a choice, the simplest first."""
    if value == field.choices[0]:
        return []
    found = [field.choices[0]]
    if isinstance(value, int) and not isinstance(value, bool):
        numbers = {value // 2, value - 1, *(c for c in field.choices if isinstance(c, int))}
        found += sorted(n for n in numbers if 0 < n < value and n != field.choices[0])
    return found
