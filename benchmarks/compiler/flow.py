"""Loops of machine code: what one pass of them executes, from `nvdisasm -c`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+?);?(?:\s|$)")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S*\s+R\d+,\s*(R\d+|gdesc)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Count(NamedTuple):
    """What one warpgroup does; instructions are those of each of its warps."""

    instructions: int = 0
    exponentials: int = 0  # all of the special-function unit
    tensor: int = 0  # clocks of the matrix unit
    shared_bytes: int = 0  # that products read
    flops: int = 0

    def plus(self, other: Count, times: int = 1) -> Count:
        """The sum of both, the other so many times."""
        return Count(*(a + times * b for a, b in zip(self, other, strict=True)))


class Block(NamedTuple):
    """Instructions of which all run if one does, and the blocks that may be next."""

    count: Count
    following: tuple[int, ...]


class Loop(NamedTuple):
    """A natural loop: its first block, those that go back to it, and all of its blocks."""

    header: int
    latches: frozenset[int]
    body: frozenset[int]


def count(line: str) -> Count:
    """What one line is."""
    if (found := _INSTRUCTION.search(line)) is None:
        return Count()
    exponentials = int(found[2].startswith("MUFU"))
    if (product := _PRODUCT.search(line)) is None:
        return Count(1, exponentials)
    columns = int(product[1])
    a_bytes = 64 * 16 * 2 if product[2] == "gdesc" else 0
    # 64 x columns x 16 multiply-adds, 2048 a clock.
    return Count(1, 0, columns // 2, columns * 16 * 2 + a_bytes, 2 * 64 * columns * 16)


def blocks(text: Sequence[str]) -> list[Block]:
    """The blocks of a kernel, in the order of its text; the first is where it starts."""
    labels: dict[str, int] = {}
    counts: list[Count] = []
    jumps: list[tuple[str | None, bool]] = []  # where to besides, and whether to the next one too
    open_block = False
    for line in text:
        if (label := _LABEL.match(line)) is not None:
            labels[label[1]] = len(counts)
            open_block = False
        if (found := _INSTRUCTION.search(line)) is None:
            continue
        if not open_block:
            counts.append(Count())
            jumps.append((None, True))
            for name, at in labels.items():  # a label stands before its block
                if at == len(counts):
                    labels[name] = len(counts) - 1
            open_block = True
        counts[-1] = counts[-1].plus(count(line))
        name, conditional = found[2], found[1] is not None
        if name.startswith("BRA"):
            target = _TARGET.search(line)
            conditional |= ".DIV" in name or bool(re.search(r"BRA\S*\s+!?U?P\d", line))
            jumps[-1] = (target[1] if target else None, conditional)
            open_block = False
        elif name.startswith(("EXIT", "RET")):
            jumps[-1] = (None, conditional)
            open_block = False
    found_blocks = []
    for i, (target_name, goes_on) in enumerate(jumps):
        following = {labels[target_name]} if target_name in labels else set()
        if goes_on and i + 1 < len(jumps):
            following.add(i + 1)
        found_blocks.append(
            Block(counts[i], tuple(sorted(f for f in following if f < len(counts))))
        )
    return found_blocks


def _order(graph: Sequence[Block]) -> list[int]:
    """Reverse postorder of what can be reached."""
    seen, done = {0}, []
    stack = [(0, iter(graph[0].following))]
    while stack:
        at, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(graph[following].following)))
                break
        else:
            done.append(at)
            stack.pop()
    return done[::-1]


def _dominators(graph: Sequence[Block], order: Sequence[int]) -> dict[int, int]:
    """Each block's closest dominator (Cooper, Harvey, Kennedy 2001)."""
    rank = {block: i for i, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in graph[block].following:
            before[following].append(block)
    closest = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in before[block] if p in closest]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while rank[new] > rank[other]:
                        new = closest[new]
                    while rank[other] > rank[new]:
                        other = closest[other]
            if closest.get(block) != new:
                closest[block] = new
                changed = True
    return closest


def loops(graph: Sequence[Block]) -> list[Loop]:
    """All natural loops; those with one header are one."""
    order = _order(graph)
    closest = _dominators(graph, order)
    before: dict[int, list[int]] = {}
    for block in order:
        for following in graph[block].following:
            before.setdefault(following, []).append(block)
    latches: dict[int, set[int]] = {}
    for block in order:
        for following in graph[block].following:
            at = block
            while at != following and at != closest[at]:
                at = closest[at]
            if at == following:
                latches.setdefault(following, set()).add(block)
    found = []
    for header, ends in latches.items():
        body, waiting = {header}, list(ends)
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += before.get(block, [])
        found.append(Loop(header, frozenset(ends), frozenset(body)))
    return found


def multiplying(graph: Sequence[Block]) -> list[tuple[Loop, frozenset[int]]]:
    """Loops with products, each with the blocks of such loops inside it; inner ones come first."""
    found = [loop for loop in loops(graph) if any(graph[block].count.flops for block in loop.body)]
    return [
        (loop, frozenset().union(*(b.body for b in found if b.body < loop.body)))
        for loop in sorted(found, key=lambda loop: len(loop.body))
    ]


def shortest(
    graph: Sequence[Block], loop: Loop, inner: frozenset[int], trips: int, least: Count
) -> Count | None:
    """One pass with the fewest instructions, of those with enough exponentials and FLOPs.

    Args:
        inner: blocks of a loop within, which runs `trips` times a pass.
        least: how many FLOPs and exponentials the pass must have.
    """
    rank = {block: i for i, block in enumerate(_order(graph))}
    ways: dict[int, dict[tuple[int, int], Count]] = {loop.header: {(0, 0): Count()}}
    best: Count | None = None
    for block in sorted(loop.body, key=lambda block: rank.get(block, len(rank))):
        here: dict[tuple[int, int], Count] = {}
        for way in ways.get(block, {}).values():
            total = way.plus(graph[block].count, trips if block in inner else 1)
            key = (total.flops, total.exponentials)
            here[key] = min(here.get(key, total), total)
        for following in graph[block].following:
            if following in loop.body and rank[following] > rank[block]:
                into = ways.setdefault(following, {})
                for key, total in here.items():
                    into[key] = min(into.get(key, total), total)
        if block in loop.latches:
            enough = [
                way for way in here.values()
                if way.flops >= least.flops and way.exponentials >= least.exponentials
            ]  # fmt: skip
            best = min([*enough, *([] if best is None else [best])], default=None)
    return best
