"""Shapes of masks and changes of scores that are operands of attention already.

A mask is looked at as a conjunction. Each part must be one of: a bound on q_idx - kv_idx (causal,
window), a bound on kv_idx (key lengths), equal ids (documents), equal chunks, or "causal or in the
prefix". A change of scores must be a softcap, ALiBi, or both; else what is added to the score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .expression import Expression, Node

aten: Any = torch.ops.aten
_AND = (aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default)
_INFINITE = 1 << 62


@dataclass
class Mask:
    """Bounds of a mask that is a conjunction of known parts.

    Attributes:
        low, high: low <= q_idx - kv_idx <= high.
        keys: kv_idx < keys; key_lengths: kv_idx < key_lengths[b].
        documents: (ids by q_idx, ids by kv_idx), (L,) or (B, L) each.
        prefix: kv_idx < prefix[b] is seen in spite of low and high.
    """

    low: int = -_INFINITE
    high: int = _INFINITE
    keys: int = _INFINITE
    key_lengths: Tensor | None = None
    documents: tuple[Tensor, Tensor] | None = None
    prefix: Tensor | None = None
    chunk: int | None = None

    def operands(self, q: Tensor, k: Tensor) -> dict[str, Any] | None:
        """Arguments of `attention`; None where it has none for these bounds."""
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[2], k.shape[2]
        found = self._diagonal(seqlen_q, seqlen_k)
        if found is None:
            return None
        if self.keys < seqlen_k or self.key_lengths is not None:
            lengths = torch.full((batch,), max(min(self.keys, seqlen_k), 0), device=q.device)
            if self.key_lengths is not None:
                given = _of_batch(self.key_lengths, batch)
                if given is None:
                    return None
                lengths = torch.minimum(lengths, given.long().clamp(min=0))
            found["key_lengths"] = lengths
        if self.documents is not None:
            of_q, of_k = self.documents
            ids = (_ids(of_q, batch, seqlen_q), _ids(of_k, batch, seqlen_k))
            if ids[0] is None or ids[1] is None:
                return None
            found["document_ids"] = ids
        if self.prefix is not None:
            prefix = _of_batch(self.prefix, batch)
            if prefix is None or "causal" not in found:
                return None
            found["prefix_lengths"] = prefix.long().clamp(0, seqlen_k)
        if self.chunk is not None:
            if "causal" not in found and seqlen_q != seqlen_k:
                return None
            found["chunk"] = self.chunk
        return found

    def _diagonal(self, seqlen_q: int, seqlen_k: int) -> dict[str, Any] | None:
        """causal and window: the first query meets the first key, or the last the last."""
        low = None if self.low <= 1 - seqlen_k else self.low
        high = None if self.high >= seqlen_q - 1 else self.high
        if low is None and high is None:
            return {}
        if low == 0:
            window = None if high is None else (high, -1)
            return None if high is not None and high < 0 else _given("upper_left", window)
        shift = seqlen_k - seqlen_q  # by which positions differ where nothing is causal
        left = -1 if high is None else high + shift
        right = -1 if low is None else -(low + shift)
        if (high is not None and left < 0) or (low is not None and right < 0):
            return None
        if right == 0:
            return _given("lower_right", None if left < 0 else (left, -1))
        return {"window": (left, right)}


def _given(causal: str, window: tuple[int, int] | None) -> dict[str, Any]:
    return {"causal": causal} if window is None else {"causal": causal, "window": window}


def _of_batch(values: Tensor, batch: int) -> Tensor | None:
    if values.is_floating_point() or values.dim() > 1:
        return None
    if values.dim() == 0:
        return values.expand(batch)
    return values[:batch] if values.shape[0] >= batch else None


def _ids(ids: Tensor, batch: int, length: int) -> Tensor | None:
    if ids.dtype not in (torch.int32, torch.int64) or ids.shape[-1] < length:
        return None
    ids = ids[..., :length]
    if ids.dim() == 1:
        return ids.expand(batch, length)
    return ids[:batch] if ids.shape[0] >= batch else None


@dataclass
class Score:
    """softcap * tanh(score / softcap) - slopes[h] * abs(q_idx - kv_idx) + added.

    Attributes:
        one_sided: the slopes go with q_idx - kv_idx as it is: right where that is never negative.
        added: what is added beside that, and does not depend on the score; or None.
    """

    softcap: float | None = None
    slopes: Tensor | None = None
    one_sided: bool = False
    added: list[Node] = field(default_factory=list)


def parts_of(expression: Expression) -> tuple[Mask, list[Node]]:
    """The bounds of the mask's known parts, and the other parts."""
    reader, found = Reader(expression), Mask()
    parts = reader.conjuncts(expression.result)
    return found, [part for part in parts if not reader.add(part, found)]


def mask_of(expression: Expression) -> Mask | None:
    """The mask's bounds; None where a part is not known."""
    found, rest = parts_of(expression)
    return None if rest else found


def score_of(expression: Expression) -> Score | None:
    """The change's parts; None where the score goes into anything else."""
    reader = Reader(expression)
    found = Score()
    terms = reader.terms(expression.result)
    if terms is None:
        return None
    scores = [term for sign, term in terms if reader.depends_on_score(term)]
    if len(scores) != 1 or any(s < 0 for s, term in terms if term is scores[0]):
        return None
    if scores[0] is not expression.inputs["score"]:
        found.softcap = reader.softcap(scores[0])
        if found.softcap is None:
            return None
    rest = [(sign, term) for sign, term in terms if term is not scores[0]]
    if len(rest) == 1:
        alibi = reader.alibi(*rest[0])
        if alibi is not None:
            found.slopes, found.one_sided = alibi
            return found
    found.added = [term for _, term in rest]
    return found


class Reader:
    """Looks at the nodes of one expression."""

    def __init__(self, expression: Expression) -> None:
        self.inputs = expression.inputs
        self.captured = expression.captured

    def conjuncts(self, node: Node) -> list[Node]:
        if node.operation in _AND:
            return [part for arg in node.args for part in self.conjuncts(arg)]
        if node.operation in (aten.new_ones.default, aten.ones_like.default):
            return []
        return [node]

    def disjuncts(self, node: Node) -> list[Node]:
        if node.operation in _OR:
            return [part for arg in node.args for part in self.disjuncts(arg)]
        if node.operation in (aten.new_zeros.default, aten.zeros_like.default):
            return []
        return [node]

    def add(self, part: Node, found: Mask) -> bool:
        """Narrow the mask by one part; False where it is not known."""
        if part.operation in _OR:
            return self._add_prefix(part, found)
        comparison = COMPARISONS.get(part.operation)
        if comparison is None:
            return False
        left, right = part.args
        if comparison == "eq" and (
            self._add_documents(left, right, found) or (self._add_chunk(left, right, found))
        ):
            return True
        if self._add_distance(comparison, left, right, found):
            return True
        if self._add_length(comparison, left, right, found):
            return True
        one, other = self.linear(left), self.linear(right)
        if one is None or other is None or comparison in ("eq", "ne"):
            return False
        return self._add_bound(comparison, [a - b for a, b in zip(one, other, strict=True)], found)

    def _add_bound(self, comparison: str, difference: list[int], found: Mask) -> bool:
        """(cq, ck, c): cq * q_idx + ck * kv_idx + c compared with 0."""
        cq, ck, c = difference
        least = {"ge": 0, "gt": 1}.get(comparison)
        if least is None:  # turn <= and < around
            cq, ck, c, least = -cq, -ck, -c, {"le": 0, "lt": 1}[comparison]
        if (cq, ck) == (1, -1):
            found.low = max(found.low, least - c)
        elif (cq, ck) == (-1, 1):
            found.high = min(found.high, c - least)
        elif (cq, ck) == (0, -1):
            found.keys = min(found.keys, c - least + 1)
        else:
            return False
        return True

    def _add_distance(self, comparison: str, left: Any, right: Any, found: Mask) -> bool:
        """abs(q_idx - kv_idx) <= a number."""
        if not isinstance(left, Node) or left.operation is not aten.abs.default:
            return False
        inside = self.linear(left.args[0])
        if inside is None or not isinstance(right, int) or comparison not in ("le", "lt"):
            return False
        most = right - (comparison == "lt")
        cq, ck, c = inside
        if abs(cq) != 1 or ck != -cq:
            return False
        shift = cq * c
        found.low, found.high = max(found.low, -most - shift), min(found.high, most - shift)
        return True

    def _add_length(self, comparison: str, left: Any, right: Any, found: Mask) -> bool:
        """kv_idx < lengths[b]."""
        if comparison in ("gt", "ge"):
            left, right, comparison = right, left, {"gt": "lt", "ge": "le"}[comparison]
        table = self.table_by(right, "b")
        if left is not self.inputs["kv_idx"] or table is None or comparison not in ("lt", "le"):
            return False
        if found.key_lengths is not None:
            return False
        found.key_lengths = table if comparison == "lt" else table + 1
        return True

    def _add_documents(self, left: Any, right: Any, found: Mask) -> bool:
        for one, other in ((left, right), (right, left)):
            ids = [self.table_by(node, name) for node, name in ((one, "q_idx"), (other, "kv_idx"))]
            if ids[0] is not None and ids[1] is not None and found.documents is None:
                found.documents = (ids[0], ids[1])
                return True
        return False

    def _add_chunk(self, left: Any, right: Any, found: Mask) -> bool:
        sizes = [self._chunk(node) for node in (left, right)]
        names = {name for name, _ in sizes}
        numbers = {number for _, number in sizes}
        if names != {"q_idx", "kv_idx"} or len(numbers) != 1 or found.chunk is not None:
            return False
        found.chunk = sizes[0][1]
        return True

    def _chunk(self, node: Any) -> tuple[str, int]:
        """The input and the number of `input // number`."""
        if not isinstance(node, Node) or len(node.args) < 2:
            return "", 0
        floor = node.operation in (aten.floor_divide.default, aten.floor_divide.Scalar) or (
            node.operation in (aten.div.Tensor_mode, aten.div.Scalar_mode)
            and dict(node.options).get("rounding_mode") == "floor"
        )
        name = node.args[0].name if isinstance(node.args[0], Node) else ""
        number = node.args[1]
        return (name, number) if floor and isinstance(number, int) and number > 0 else ("", 0)

    def _add_prefix(self, part: Node, found: Mask) -> bool:
        """(a bound on q_idx - kv_idx) or kv_idx < prefix[b]."""
        pieces = self.disjuncts(part)
        if len(pieces) != 2:
            return False
        for one, other in (pieces, pieces[::-1]):
            band, inside = Mask(), Mask()
            plain = all(self.add(each, band) for each in self.conjuncts(one))
            if not plain or band != Mask(low=band.low, high=band.high):
                continue
            if not self.add(other, inside) or inside.key_lengths is None:
                continue
            if found.prefix is None and (found.low, found.high) == (-_INFINITE, _INFINITE):
                found.prefix = inside.key_lengths
                found.low, found.high = band.low, band.high
                return True
        return False

    def table_by(self, node: Any, name: str) -> Tensor | None:
        """The captured table of `table[name]`, or of `table[b, name]` for positions."""
        if not isinstance(node, Node) or node.operation is not aten.index.Tensor:
            return None
        table, indices = node.args
        names = [getattr(index, "name", None) for index in indices]
        if isinstance(table, Node) and table.operation is aten.index.Tensor:  # table[b][name]
            names = [getattr(index, "name", None) for index in table.args[1]] + names
            table = table.args[0]
        if not isinstance(table, Node) or table.captured < 0 or names not in ([name], ["b", name]):
            return None
        tensor = self.captured[table.captured]
        return tensor if tensor.dim() == len(names) else None

    def linear(self, value: Any) -> tuple[int, int, int] | None:
        """(a, b, c) of a * q_idx + b * kv_idx + c."""
        if isinstance(value, bool):
            return None
        if isinstance(value, int):
            return (0, 0, value)
        if not isinstance(value, Node):
            return None
        if value is self.inputs["q_idx"]:
            return (1, 0, 0)
        if value is self.inputs["kv_idx"]:
            return (0, 1, 0)
        if value.operation in _PLUS_MINUS and not dict(value.options):
            sign = 1 if value.operation in _PLUS else -1
            one, other = (self.linear(arg) for arg in value.args[:2])
            if one is None or other is None or len(value.args) > 2:
                return None
            return (one[0] + sign * other[0], one[1] + sign * other[1], one[2] + sign * other[2])
        if value.operation is aten.neg.default:
            inside = self.linear(value.args[0])
            return None if inside is None else (-inside[0], -inside[1], -inside[2])
        return None

    def terms(self, node: Any, sign: int = 1) -> list[tuple[int, Any]] | None:
        """What a sum adds up, with signs; None where it does so by a factor."""
        if isinstance(node, Node) and node.operation in _PLUS_MINUS:
            if dict(node.options) or len(node.args) > 2:
                return None
            if not self.depends_on_score(node):
                return [(sign, node)]
            second = sign if node.operation in _PLUS else -sign
            one, other = self.terms(node.args[0], sign), self.terms(node.args[1], second)
            return None if one is None or other is None else one + other
        return [(sign, node)]

    def depends_on_score(self, node: Any) -> bool:
        if isinstance(node, Node):
            return node.name == "score" or self.depends_on_score(node.args)
        if isinstance(node, (list, tuple)):
            return any(self.depends_on_score(each) for each in node)
        return False

    def softcap(self, node: Node) -> float | None:
        """c of c * tanh(score / c)."""
        if node.operation is not aten.mul.Tensor:
            return None
        for tanh, cap in (node.args, node.args[::-1]):
            if not isinstance(tanh, Node) or tanh.operation is not aten.tanh.default:
                continue
            inside = tanh.args[0]
            if isinstance(cap, Node) or not isinstance(inside, Node):
                continue
            if inside.args[:1] != (self.inputs["score"],) or not cap > 0 or len(inside.args) != 2:
                continue
            divided = inside.operation is aten.div.Tensor and inside.args[1] == cap
            times = inside.operation is aten.mul.Tensor and inside.args[1] == 1 / cap
            if divided or times:
                return float(cap)
        return None

    def alibi(self, sign: int, node: Any) -> tuple[Tensor, bool] | None:
        """The slopes of slopes[h] * (kv_idx - q_idx), or of -slopes[h] * abs(q_idx - kv_idx)."""
        if not isinstance(node, Node) or node.operation is not aten.mul.Tensor:
            return None
        for one, other in (node.args, node.args[::-1]):
            slopes = self.table_by(one, "h")
            if slopes is None or slopes.dtype != torch.float32:
                continue
            distance = other
            while isinstance(distance, Node) and distance.operation is aten._to_copy.default:
                distance = distance.args[0]
            if isinstance(distance, Node) and distance.operation is aten.abs.default:
                inside = self.linear(distance.args[0])
                return (slopes, False) if sign < 0 and inside in ((1, -1, 0), (-1, 1, 0)) else None
            inside = self.linear(distance)
            if inside == (-sign, sign, 0):
                return slopes, True
        return None


_PLUS = (aten.add.Tensor, aten.add.Scalar)
_PLUS_MINUS = (*_PLUS, aten.sub.Tensor, aten.sub.Scalar)
COMPARISONS = {
    getattr(getattr(aten, name), overload): name
    for name in ("ge", "gt", "le", "lt", "eq", "ne")
    for overload in ("Tensor", "Scalar")
}
