"""Reads the CUDA kernels out of the compiled module: resources and instructions.

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
    text: list[str] = field(default_factory=list)  # lines of `nvdisasm -c`
    opcodes: list[str] = field(default_factory=list)

    def count(self, mnemonic: str) -> int:
        return sum(opcode.startswith(mnemonic) for opcode in self.opcodes)


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
        elif kernel is not None:
            kernel.text.append(line)
            if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)", line):
                kernel.opcodes.append(instruction[1].rstrip(";"))


def registers_after(kernel: Kernel, mnemonic: str) -> tuple[int, int]:
    """(what the one `mnemonic`, a USETMAXREG, asks for; how many its code then uses)."""
    labels = {
        label[1]: i
        for i, line in enumerate(kernel.text)
        if (label := re.match(r"(\.L_x_\d+):", line.strip()))
    }
    [start] = [i for i, line in enumerate(kernel.text) if mnemonic in line]
    asked = re.search(r"0x[0-9a-f]+", kernel.text[start].split(mnemonic)[1])
    assert asked, kernel.text[start]
    used = 0
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        i = waiting.pop()
        while i < len(kernel.text) and i not in seen:
            seen.add(i)
            line = kernel.text[i].split(";")[0]
            used = max(used, _registers_of(line))
            waiting += [
                labels[label] for label in re.findall(r"\.L_x_\d+", line) if label in labels
            ]
            if re.search(r"\*/\s+(EXIT|BRA `)", line):  # without a predicate
                break
            i += 1
    return int(asked[0], 16), used


def _registers_of(instruction: str) -> int:
    """One more than the highest register: names stand for the first of several."""
    width = 4 if ".128" in instruction else 2 if ".64" in instruction else 1
    if product := re.search(r"HGMMA\.64x(\d+)x", instruction):
        width = int(product[1]) // 2
    names = [int(name) for name in re.findall(r"\bR(\d+)\b", instruction)]
    if not names:
        return 0
    # An accumulator comes first; what follows it is at most four registers of A.
    return max(names[0] + width, *(name + min(width, 4) for name in names))
