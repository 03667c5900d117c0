"""Finds instructions that touch registers of an asynchronous matrix product (HGMMA) still running.

A product runs from its issue to the WARPGROUP.DEPBAR that waits for its group. Until then nothing
may write the registers of its A operand, or read or write those of its accumulator. Backward
branches are followed once.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Hazard = tuple[str, int, str]  # kind, index of the instruction, its text

_STORES = ("ST", "RED", "BAR", "SYNCS", "BRA", "UTMA", "ATOM")


class Product(NamedTuple):
    operand: set[int]  # registers of A; empty where A is in shared memory
    accumulator: set[int]


class Running(NamedTuple):
    """Committed groups of products, oldest first, and the products since the last commit."""

    groups: list[list[Product]]
    current: list[Product]

    def products(self) -> list[Product]:
        return [product for group in [*self.groups, self.current] for product in group]


def hazards(code: str) -> tuple[int, list[Hazard]]:
    """(number of products with A in registers, hazards) of the output of `nvdisasm -c`."""
    instructions, labels = _parse(code)
    running = Running([], [])
    found: set[Hazard] = set()
    for i, text in enumerate(instructions):
        branch = re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", text)
        if branch and labels.get(branch.group(1), i + 1) <= i and running.products():
            around = running
            for j in range(labels[branch.group(1)], i):
                around = _step(instructions[j], j, around, found)
                if not around.products():
                    break
        running = _step(text, i, running, found)
        if re.match(r"(@!?P\d )?(EXIT|RET)", text):
            running = Running([], [])
    in_registers = sum(bool(re.search(r"GMMA\S+ R\d+, R\d+,", text)) for text in instructions)
    return in_registers, sorted(found, key=lambda hazard: hazard[1])


def _parse(code: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the index that each label stands before."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if instruction:
            instructions.append(instruction.group(1).strip())
    return instructions, labels


def _step(text: str, index: int, running: Running, found: set[Hazard]) -> Running:
    """What runs after one instruction; its hazards go to `found`."""
    body = re.sub(r"^@!?U?P\w+\s+", "", text)
    opcode, _, rest = body.partition(" ")
    if opcode.startswith(("HGMMA", "QGMMA")):
        current = [*running.current, _product(opcode, rest)]
        if "gsb0" in text:
            return Running([*running.groups, current], [])
        return Running(running.groups, current)
    if opcode.startswith("WARPGROUP.DEPBAR"):
        wait = re.search(r"gsb0, (0x[0-9a-f]+)", text)
        pending = int(wait.group(1), 16) if wait else 0
        kept = running.groups[-pending:] if pending else []
        return Running(kept, running.current)
    products = running.products()
    if products:
        _check(text, opcode, rest, index, products, found)
    return running


def _product(opcode: str, rest: str) -> Product:
    size = re.search(r"64x(\d+)x", opcode)
    destination, first, *_ = [operand.strip() for operand in rest.split(",")]
    assert size is not None
    start = int(destination[1:]) if re.match(r"R\d+$", destination) else 0
    operand = re.match(r"R(\d+)", first)
    of_a = int(operand.group(1)) if operand and not first.startswith("gdesc") else None
    return Product(
        set() if of_a is None else set(range(of_a, of_a + 4)),
        set(range(start, start + int(size.group(1)) // 2)),
    )


def _check(
    text: str, opcode: str, rest: str, index: int, products: list[Product], found: set[Hazard]
) -> None:
    operands = set().union(*(product.operand for product in products))
    accumulators = set().union(*(product.accumulator for product in products))
    registers = [int(number) for number in re.findall(r"\bR(\d+)\b", rest)]
    destination = re.match(r"R(\d+)\b", rest.strip())
    if destination and not opcode.startswith(_STORES):
        width = 1
        if ".128" in opcode or ".M88.4" in opcode:
            width = 4
        elif ".64" in opcode or ".WIDE" in opcode or opcode.startswith("CS2R"):
            width = 2
        start = int(destination.group(1))
        written = set(range(start, start + width))
        if written & operands:
            found.add(("A-overwrite", index, text))
        if written & accumulators:
            found.add(("C-overwrite", index, text))
        registers = registers[1:]
    if set(registers) & accumulators:
        found.add(("C-read", index, text))
