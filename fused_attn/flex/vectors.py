"""What an expression needs of one index alone: vectors along queries, keys or distances, by torch.

`table[q_idx - kv_idx + L]` is a vector along the distance of query and key, `documents[q_idx]` one
along the queries. They are made before a kernel starts, by the user's own operations; what kernels
run for each pair is only what joins them with each other and with the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .expression import Expression, Node, nodes_in, run
from .known import COMPARISONS, Reader
from .pairs import CannotCompile

aten: Any = torch.ops.aten

# What a vector goes along, by what its node depends on beside batch and head.
PLACES = {
    frozenset(): "one",
    frozenset("q"): "query",
    frozenset("k"): "key",
    frozenset("d"): "distance",
}
_INPUTS = {"b": "b", "h": "h", "q_idx": "q", "kv_idx": "k", "score": "s"}


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int

    def of(self, name: str) -> int:
        """How many numbers an input may be."""
        lengths = {"b": self.batch, "h": self.heads, "q_idx": self.seqlen_q}
        return lengths.get(name, self.seqlen_k)

    def along(self, place: str) -> int:
        """Numbers of a vector."""
        lengths = {"one": 1, "query": self.seqlen_q, "key": self.seqlen_k}
        return lengths.get(place, self.seqlen_q + self.seqlen_k - 1)


class Vectors:
    """The vectors of one expression.

    Args:
        captured: the tensors that it captured, as they are to be differentiated.
        device: where the vectors are made.
    """

    def __init__(
        self, expression: Expression, captured: list[Tensor], sizes: Sizes, device: torch.device
    ) -> None:
        self.sizes = sizes
        self._captured = captured
        self._reader = Reader(expression)
        self._device = device
        self._by_positions: dict[Node, bool] = {}
        inputs = {
            "b": torch.arange(sizes.batch, device=device)[:, None, None, None],
            "h": torch.arange(sizes.heads, device=device)[:, None, None],
            "q_idx": torch.arange(sizes.seqlen_q, device=device)[:, None],
            "kv_idx": torch.arange(sizes.seqlen_k, device=device)[None, :],
        }
        self._values: dict[Node, Any] = {
            node: inputs[name] for name, node in expression.inputs.items() if name in inputs
        }
        self._depends: dict[Node, frozenset[str]] = {
            node: frozenset(_INPUTS[name]) for name, node in expression.inputs.items()
        }

    def depends(self, node: Node) -> frozenset[str]:
        """On which of b, h, q, k, d (the distance of query and key) and s (the score)."""
        found = self._depends.get(node)
        if found is None:
            if self._distance(node) is not None:
                found = frozenset("d")
            else:
                parts = [self.depends(each) for each in nodes_in((node.args, node.options))]
                found = frozenset().union(*parts)
            self._depends[node] = found
        return found

    def by_positions(self, node: Node) -> bool:
        """Whether a node is a whole number made of positions alone, without what was captured."""
        if node not in self._by_positions:
            inside = [self.by_positions(x) for x in nodes_in((node.args, node.options))]
            whole = node.dtype is not None and not node.dtype.is_floating_point
            self._by_positions[node] = whole and node.captured < 0 and all(inside)
        return self._by_positions[node]

    def place(self, node: Node) -> str | None:
        """What the node's vector goes along; None where it depends on more than one index."""
        return PLACES.get(self.depends(node) - frozenset("bh"))

    def vector(self, node: Node) -> Tensor:
        """(B or 1, H or 1, n) of a node that has a place."""
        value = self.value(node)
        if not isinstance(value, Tensor):
            raise CannotCompile("takes part of a table where it could take a number")
        place = self.place(node)
        four = value[(None,) * (4 - value.dim())]
        three = four[..., 0] if place == "query" else four[:, :, 0]
        return three.expand(-1, -1, self.sizes.along(place or "one"))

    def value(self, node: Node) -> Any:
        """The node's value for all places at once."""
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: Node) -> Any:
        if node.captured >= 0:
            return self._captured[node.captured]
        distance = self._distance(node)
        if distance is not None:
            return distance()
        for each in nodes_in((node.args, node.options)):
            self.value(each)
        return run(node, self._values)

    def _distance(self, node: Node) -> Any:
        """How to make a node of q_idx - kv_idx alone; None if it is none, or not at once."""
        if node.name or node.captured >= 0:
            return None
        one: Any = self._reader.linear(node)
        compared = node.operation in COMPARISONS
        if compared:
            left, right = (self._reader.linear(arg) for arg in node.args)
            if left is None or right is None:
                return None
            one = tuple(a - b for a, b in zip(left, right, strict=True))
        if one is None or one[:2] not in ((1, -1), (-1, 1)):
            return None

        def made() -> Tensor:
            first, last = 1 - self.sizes.seqlen_k, self.sizes.seqlen_q
            distances = torch.arange(first, last, device=self._device)
            value = one[0] * distances + one[2]
            name = COMPARISONS[node.operation] if compared else ""
            return getattr(torch, name)(value, 0) if compared else value

        return made
