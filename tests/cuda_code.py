"""Reads the CUDA kernels out of the compiled module: resources, instructions, register hazards.

Disassembled by the tools that Triton's wheel brings; nothing here needs a GPU.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    """One kernel: its mangled name, what `cuobjdump -res-usage` says, and its instructions."""

    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    lines: list[str] = field(default_factory=list)  # instructions without predicates
    labels: dict[str, int] = field(default_factory=dict)  # label: index of the next instruction

    def count(self, mnemonic: str) -> int:
        return sum(line.startswith(mnemonic) for line in self.lines)


def tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def read_kernels(module: Path, folder: Path) -> list[Kernel]:
    """All kernels in a shared library; `folder` takes the files in between."""
    cuobjdump, nvdisasm = tools() / "cuobjdump", tools() / "nvdisasm"
    _run(cuobjdump, "-xelf", "all", module, cwd=folder)
    kernels: dict[str, Kernel] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        for name, resources in _resources(_run(cuobjdump, "-res-usage", cubin)).items():
            kernels[name] = Kernel(name, **resources)
        _read_instructions(_run(nvdisasm, "-c", cubin), kernels)
    return list(kernels.values())


def _run(*command: object, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _resources(text: str) -> dict[str, dict[str, int]]:
    pattern = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    return {
        name: {"registers": int(registers), "stack": int(stack), "local": int(local)}
        for name, registers, stack, local in pattern.findall(text)
    }


def _read_instructions(text: str, kernels: dict[str, Kernel]) -> None:
    kernel = None
    for line in text.splitlines():
        if section := re.match(r"\.section\s+\.text\.(\S+?),", line.strip()):
            kernel = kernels.get(section[1])
        elif kernel is None:
            continue
        elif label := re.match(r"(\.L_x_\d+):", line.strip()):
            kernel.labels[label[1]] = len(kernel.lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            kernel.lines.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))


@dataclass
class _Flight:
    """Registers of matrix products that were issued and not waited for, by committed group."""

    groups: list[tuple[set[int], set[int]]] = field(default_factory=list)
    open: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))

    def all(self) -> list[tuple[set[int], set[int]]]:
        return [*self.groups, self.open]


# The first register of these is read, not written.
_NO_RESULT = ("ST", "RED", "BAR", "SYNCS", "BRA", "UTMA", "UBLK", "ATOM", "WARPGROUP", "R2UR")


def hazards(kernel: Kernel) -> list[str]:
    """Instructions that touch registers of a matrix product in flight.

    A product (HGMMA) reads its register operand, and reads and writes its accumulator, until a
    WARPGROUP.DEPBAR has waited for its group. ptxas must not reuse them before, and some versions
    did (triton-lang/triton pull request 11781). Loops are followed around once.
    """
    found: list[str] = []
    flight = _Flight()
    for index, line in enumerate(kernel.lines):
        target = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and kernel.labels.get(target[1], index + 1) <= index and any(flight.all()[0]):
            again = _Flight(list(flight.groups), (set(flight.open[0]), set(flight.open[1])))
            for repeated in kernel.lines[kernel.labels[target[1]] : index]:
                _step(repeated, again, found)
        _step(line, flight, found)
        if line.startswith(("EXIT", "RET")):
            flight = _Flight()
    return sorted(set(found))


def _step(line: str, flight: _Flight, found: list[str]) -> None:
    mnemonic = line.split()[0]
    if mnemonic.startswith("HGMMA"):
        operands, accumulator = _product_registers(line)
        flight.open[0].update(operands)
        flight.open[1].update(accumulator)
        if "gsb0" in line:
            flight.groups.append(flight.open)
            flight.open = (set(), set())
        return
    if mnemonic.startswith("WARPGROUP.DEPBAR"):
        left = int(re.search(r"gsb0, (0x[0-9a-f]+)", line)[1], 16)
        flight.groups = flight.groups[len(flight.groups) - left :] if left else []
        return
    operands = set().union(*(group[0] for group in flight.all()))
    accumulators = set().union(*(group[1] for group in flight.all()))
    if not operands and not accumulators:
        return
    written, read = _touched(line, mnemonic)
    if written & operands:
        found.append(f"writes an operand in flight: {line}")
    if (written | read) & accumulators:
        found.append(f"touches an accumulator in flight: {line}")


def _product_registers(line: str) -> tuple[set[int], set[int]]:
    parts = [part.strip() for part in line.split(None, 1)[1].split(",")]
    columns = int(re.search(r"64x(\d+)x", line)[1])
    first = int(re.match(r"R(\d+)", parts[0])[1])
    operand = re.match(r"R(\d+)$", parts[1])
    registers = range(int(operand[1]), int(operand[1]) + 4) if operand else ()
    return set(registers), set(range(first, first + columns // 2))


def _touched(line: str, mnemonic: str) -> tuple[set[int], set[int]]:
    rest = line[len(mnemonic) :].strip()
    registers = [int(number) for number in re.findall(r"\bR(\d+)\b", rest)]
    result = re.match(r"R(\d+)\b", rest)
    if result is None or mnemonic.startswith(_NO_RESULT):
        return set(), set(registers)
    width = 1
    if ".128" in mnemonic:
        width = 4
    elif ".64" in mnemonic or ".WIDE" in mnemonic or mnemonic.startswith("CS2R"):
        width = 2
    first = int(result[1])
    return set(range(first, first + width)), set(registers[1:])
