"""What Triton's compiler makes of the shipped kernels, for any architecture, without a GPU.

`python -m benchmarks.compiler.triton_report [--arch 80 90 100 120] [--all] [--jobs N] [--json]`
compiles the kernels of representative calls as a launch would and prints registers, spills, shared
memory and the instructions that matter, read from the machine code. It fails if an innermost loop
touches spilled registers. (Values that only what follows the loops needs may be set aside before.)
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fused_attn.runtime.triton import device as triton_device

# Groups of machine instructions, by what their names start with, on NVIDIA's GPUs and on AMD's.
INSTRUCTIONS = {
    "mma": ("HMMA", "HGMMA", "UTCHMMA", "v_mfma", "v_wmma"),
    "wgmma": ("HGMMA",),
    "tcgen05": ("UTCHMMA",),
    "cp.async": ("LDGSTS",),
    "tma": ("UTMALDG",),
    "local": ("LDL", "STL", "scratch_load", "scratch_store"),
}


class Kernel(NamedTuple):
    """One compiled kernel."""

    call: str
    kernel: str
    arch: int | str  # as for `triton_device.compiling_for`
    registers: int
    stack: int  # bytes; spilled registers live there
    shared: int  # bytes
    spills: int  # instructions within innermost loops that write or read the stack
    counts: dict[str, int]  # of the groups of INSTRUCTIONS
    seconds: float  # of compiling


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


# Registers, bytes of stack, instructions in loops that touch it, counts of INSTRUCTIONS.
Figures = tuple[int, int, int, dict[str, int]]


def spills_in_loops(code: str, label: str, opcode: str, branch: str) -> int:
    """Instructions of the group "local" in innermost loops, from a label to a branch back to it.

    Args:
        label, opcode, branch: patterns of a line that name a label, an operation, a target.
    """
    labels: dict[str, int] = {}
    local: list[int] = []
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(code.splitlines()):
        if found := re.match(label, line):
            labels[found[1]] = number
        if (found := re.search(branch, line)) and found[1] in labels:
            loops.append((labels[found[1]], number))
        if (found := re.search(opcode, line)) and found[1].startswith(INSTRUCTIONS["local"]):
            local.append(number)
    innermost = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    return sum(any(first <= number <= last for first, last in innermost) for number in local)


@functools.lru_cache(maxsize=64)  # the calls of an architecture have kernels in common
def _figures(cubin: bytes) -> Figures:
    usage, code = disassemble(cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    opcode = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)"
    spills = spills_in_loops(code, r"(\.L\w+):", opcode, r"\bBRA\b.*`\((\.L\w+)\)")
    stack = numbers["STACK"] + numbers["LOCAL"]
    return numbers["REG"], stack, spills, _counts(re.findall(opcode, code))


def _amd_figures(assembly: str) -> Figures:
    """AMD's compiler writes them down beside the code."""
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", assembly, re.M)}
    opcode = r"^\t([a-z]\w+)"
    spills = spills_in_loops(assembly, r"(\.LBB\w+):", opcode, r"_c?branch\w* (\.LBB\w+)")
    counts = _counts(re.findall(opcode, assembly, re.M))
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"], spills, counts


def _counts(opcodes: list[str]) -> dict[str, int]:
    return {
        group: sum(opcode.startswith(starts) for opcode in opcodes)
        for group, starts in INSTRUCTIONS.items()
    }


def inspect(call: str, name: str, arch: int | str, compiled: Any, seconds: float) -> Kernel:
    """What a compiled kernel needs, from its machine code."""
    if "cubin" in compiled.asm:
        figures = _figures(compiled.asm["cubin"])
    else:
        figures = _amd_figures(compiled.asm["amdgcn"])
    registers, stack, spills, counts = figures
    shared = compiled.metadata.shared
    return Kernel(call, name, arch, registers, stack, shared, spills, counts, seconds)


def kernels(
    arch: int | str, calls: dict[str, Callable[[], None]], candidates: int = 1
) -> Iterator[tuple[Kernel, Any]]:
    """Compile what each of `calls` launches; every kernel and what Triton made of it.

    Args:
        candidates: how many of the tiles that a kernel may have, from the default on.
    """
    for call, run in calls.items():
        found: dict[tuple[str, str], tuple[Any, float]] = {}
        for candidate in range(candidates):
            with triton_device.compiling_for(arch, _compiling_new_ones(found), candidate):
                run()
        for (name, _), (compiled, seconds) in found.items():
            yield inspect(call, name, arch, compiled, seconds), compiled


def _compiling_new_ones(
    found: dict[tuple[str, str], tuple[Any, float]],
) -> Callable[[triton_device.Wanted], None]:
    def compile_if_new(wanted: triton_device.Wanted) -> None:
        key = (wanted.kernel, wanted.constants)
        if key not in found:
            start = time.perf_counter()
            found[key] = (wanted.compile(), time.perf_counter() - start)

    return compile_if_new


def all_calls(arch: int | str, everything: bool) -> dict[str, Callable[[], None]]:
    """The representative calls of every operation."""
    from . import attention, bias_activation, functions, layer_norm

    operations = (attention, functions, layer_norm, bias_activation)
    return {k: v for operation in operations for k, v in operation.calls(arch, everything).items()}


_COLUMNS = (
    *("arch", "call", "kernel", "registers", "stack", "spills", "shared"),
    *("mma", "cp.async", "tma", "s"),
)


def _row(kernel: Kernel) -> str:
    """A line of the table."""
    numbers = (
        *(kernel.registers, kernel.stack, kernel.spills, kernel.shared),
        *(kernel.counts[group] for group in ("mma", "cp.async", "tma")),
    )
    cells = (kernel.arch, kernel.call, kernel.kernel, *numbers, f"{kernel.seconds:.1f}")
    return f"| {' | '.join(map(str, cells))} |"


def _report_on(everything: bool, candidates: int, task: tuple[int | str, str]) -> list[Kernel]:
    """The kernels of one call for one architecture."""
    arch, call = task
    calls = {call: all_calls(arch, everything)[call]}
    return [kernel for kernel, _ in kernels(arch, calls, candidates)]


@contextlib.contextmanager
def _mapping(jobs: int) -> Iterator[Callable[..., Iterable[list[Kernel]]]]:
    """`map` by that many processes; results come in order."""
    if jobs == 1:
        yield map
        return
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        yield pool.map


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiler.triton_report")
    parser.add_argument(
        "--arch",
        type=lambda text: int(text) if text.isdigit() else text,
        nargs="+",
        default=[80, 90, 100, 120],
        help='compute capabilities; "gfx942" and the like for AMD',
    )
    parser.add_argument("--all", action="store_true", help="every kernel that is shipped")
    parser.add_argument("--candidates", type=int, help="how many tiles of each; with --all, all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--match", default="", help="only calls whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    options = parser.parse_args(arguments)
    if not options.json:
        print(f"| {' | '.join(_COLUMNS)} |")
        print("|---" * len(_COLUMNS) + "|")
    count = spilling = 0
    candidates = options.candidates or (4 if options.all else 1)
    tasks = [
        (arch, call)
        for arch in options.arch
        for call in all_calls(arch, options.all)
        if options.match in call
    ]
    with _mapping(options.jobs) as mapping:
        reports = mapping(functools.partial(_report_on, options.all, candidates), tasks)
        for kernel in itertools.chain.from_iterable(reports):
            count += 1
            spilling += kernel.spills > 0
            print(json.dumps(kernel._asdict()) if options.json else _row(kernel), flush=True)
    print(f"{count} kernels, {spilling} spill registers in innermost loops", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
