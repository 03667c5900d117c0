"""Functions of pairs of a query and a key, as backends take them that make their own code of them.

A value says what computes it: `operation` and `args` (values), `bounds` of whole numbers (None of
real ones), `constant`, and the number of the `leaf` that it loads. The operations are those of
`csrc/attention/functions.h`; `flex` makes the values.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Value(Protocol):
    """The result of one operation."""

    operation: str
    args: tuple[Any, ...]
    bounds: tuple[int, int] | None
    constant: float
    leaf: int
    number: int  # larger than those of its arguments


class Leaf(Protocol):
    """What operations load: a vector (B or 1, H or 1, n), or a table.

    `place` is what a vector goes along: "one" (n = 1), "query", "key" or "distance" (query - key,
    from 1 - Lk on); "table" of a table. `name` is "b", "h", "q_idx" or "kv_idx" of a leaf that is
    no more than that number.
    """

    place: str
    name: str
    tensor: Tensor


class Sum(NamedTuple):
    """Of the gradient of a leaf: what one pair gives is `part` times the changed score's gradient.

    `total` is what they are added up in: (B, H, n) of a vector, and of a table its shape.
    """

    load: Value
    part: Value
    total: Tensor


class PairFunctions(NamedTuple):
    """The functions of a call.

    Attributes:
        mask: what says who is seen (0 or 1), or None.
        score: the changed score, or None.
        slope: its derivative by the score; None: 1, or not wanted.
        kinds: what a list of blocks says, (B or 1, H or 1, blocks of queries, blocks of keys): 0
            nothing is seen, 1 the mask decides, 2 all is seen; or None.
        block: queries and keys of such a block.
        leaves: what is loaded.
        sums: gradients of leaves that are wanted.
        memory: where a backend keeps what follows from the mask and the lengths alone, for other
            calls in which those are the same; None: nowhere.
    """

    mask: Any
    score: Any
    slope: Any
    kinds: Tensor | None
    block: tuple[int, int]
    leaves: Sequence[Any]
    sums: Sequence[Sum] = ()
    memory: dict[Hashable, Any] | None = None
