"""What the shipped sm_90a kernels would do on an H200, from their machine code: predictions.

    python -m benchmarks.compiler.machine_model MODULE [--save]

MODULE is a compiled `_C` with the Hopper kernels (`make cuda` leaves one in build/cuda). Of each
attention kernel's loop with matrix products the model counts, for one step of all its warpgroups,
the clocks that the matrix unit, the exponentials, the issue of instructions and the products' reads
of shared memory take. A step then takes the matrix unit's clocks and a share of those of the busier
of exponentials and issue. That share, one number for forwards and one for backwards, and what short
calls lose come from published figures (`calibration.py`); how far the model is from others that it
was not fitted to is its error. Nothing here ran on a GPU.

It does not see whether a kernel does beside its products what the fitted kernels do beside theirs:
the order of instructions is not in it. `tests/cuda/test_code.py` counts that.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.compiler import calibration, flow
from benchmarks.compiler.calibration import Clocks
from benchmarks.compiler.flow import Count
from benchmarks.suites.machine import CHECKOUT, RESULTS

FILE = RESULTS / "model" / "sm_90a.csv"
PAGE = CHECKOUT / "docs" / "cuda.md"
MARKS = "<!-- model: begin -->", "<!-- model: end -->"
LENGTHS = (2048, 4096, 8192, 16384)
WARPS = 4  # of a warpgroup


class Shape(NamedTuple):
    """What a kernel is, from its name."""

    kernel: str  # "forward", "dq", "dkdv" or "dqdkdv"
    head_dim: int
    element: str
    general: bool  # scores are modified, masked by element or dropped
    groups: int  # warpgroups that multiply
    rows: int  # queries of a step
    keys: int

    def flops(self) -> int:
        """Of one step of all warpgroups."""
        products = {"forward": 2, "dq": 3, "dkdv": 4, "dqdkdv": 5}[self.kernel]
        return products * self.product()

    def product(self) -> int:
        """FLOPs of one product of a step."""
        return 2 * self.rows * self.keys * self.head_dim

    def is_split(self) -> bool:
        """Whether one warpgroup makes dv and the other dk, both from scores of their own."""
        return self.kernel in ("dkdv", "dqdkdv") and self.head_dim > 128

    def parts(self) -> tuple[int, ...]:
        """FLOPs of a step of each kind of warpgroup."""
        if not self.is_split():
            return (self.flops() // self.groups,)
        with_dv = 2 if self.kernel == "dkdv" else 3  # dq is with it
        return (with_dv * self.product(), 3 * self.product())


def shape_of(name: str) -> Shape | None:
    """The shape of an attention kernel by its mangled name; None for any other."""
    found = re.search(r"(ForwardConfigOf|DqConfig|DkDvConfig)I(.+)E", name)
    if found is None:
        return None
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E", found[2])]
    element = "bf16" if re.search("bfloat|BFloat", name, re.IGNORECASE) else "fp16"
    head_dim = numbers[0]
    general = bool(numbers[1])
    if found[1] == "ForwardConfigOf":
        groups = 3 if head_dim == 64 and not general else 2
        keys = {192: 96, 256: 64}.get(head_dim, 128)
        return Shape("forward", head_dim, element, general, groups, 64 * groups, keys)
    if found[1] == "DqConfig":
        keys = 32 if general and head_dim > 96 else 64
        return Shape("dq", head_dim, element, general, 2, 128, keys)
    rows = 64 if not general else 16 if head_dim > 192 else 32
    kernel = "dqdkdv" if numbers[2] else "dkdv"
    return Shape(kernel, head_dim, element, general, 2, rows, 64 if head_dim > 128 else 128)


def step_of(shape: Shape, text: Sequence[str]) -> Count:
    """One step of all warpgroups, instructions and exponentials of one warp of each added up.

    It is that of a tile that everybody sees: the shortest way through the loop that has a step's
    products and exponentials. Warpgroups with parts of their own have loops of their own.

    Raises:
        ValueError: no loop has the products of a step.
    """
    graph = flow.blocks(text)
    found = flow.multiplying(graph)
    exponentials = shape.rows * shape.keys // (128 if shape.is_split() else 128 * shape.groups)
    parts = shape.parts()
    taken: list[Count] = []
    for flops in parts:
        least = Count(flops=flops, exponentials=exponentials)
        steps: list[tuple[flow.Loop, Count]] = []
        for loop, inner in found:
            if any(step.body < loop.body for step, _ in steps):
                continue  # it walks over heads or sequences
            way = flow.shortest(graph, loop, inner, -(-shape.head_dim // 64), least)
            if way is not None:
                steps.append((loop, way))
        if not steps:
            raise ValueError(f"no loop of {shape} makes {flops} FLOPs a warpgroup")
        taken.append(min(way for _, way in steps))
    total = Count()
    for part in taken:
        total = total.plus(part, shape.groups // len(parts))
    return total


def clocks_of(step: Count) -> Clocks:
    """Of the multiprocessor; four schedulers issue one warp instruction a clock each.

    A special-function instruction of a warp takes its scheduler's unit 8 clocks, and shared memory
    gives 128 bytes a clock.
    """
    return Clocks(
        tensor=step.tensor,
        exponentials=step.exponentials * WARPS * 8 // 4,
        issue=step.instructions * WARPS // 4,
        shared=step.shared_bytes // 128,
    )


def rows(kernels: Iterable[tuple[str, Sequence[str]]]) -> list[dict[str, object]]:
    """A row an attention kernel of (mangled name, text); other kernels are left out."""
    found = []
    for name, text in kernels:
        shape = shape_of(name)
        if shape is not None:
            found.append((shape, row(shape, clocks_of(step_of(shape, text)))))
    return [row for _, row in sorted(found, key=lambda each: each[0])]


def row(shape: Shape, clocks: Clocks) -> dict[str, object]:
    """What is predicted of a kernel. TFLOP/s are of its own products."""
    family = "forward" if shape.kernel == "forward" else "backward"
    step = calibration.step_clocks(family, clocks)
    result: dict[str, object] = {
        **shape._asdict(), **clocks._asdict(), "limit": clocks.limit(), "step": round(step),
        "share_of_peak": round(calibration.ideal(shape.flops()) / step, 3),
    }  # fmt: skip
    for causal in (False, True):
        for length in LENGTHS:
            speed = calibration.tflops(family, shape.flops(), clocks, length, causal)
            result[column(causal, length)] = round(speed)
    return result


def column(causal: bool, length: int) -> str:
    return f"{'causal' if causal else 'full'}_{length}"


def save(found: Sequence[dict[str, object]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def table(recorded: Sequence[dict[str, str]]) -> str:
    """The predictions of bfloat16 and plain calls, and how far off the model is where it is known.

    A backward of two kernels takes the time of both; it counts as five products like any other.
    """
    by_shape: dict[tuple[str, int], dict[str, str]] = {}
    for each in recorded:
        if each["element"] == "bf16" and each["general"] == "False":
            by_shape[each["kernel"], int(each["head_dim"])] = each
    wanted = [(causal, length) for causal in (False, True) for length in (2048, 8192, 16384)]
    columns = [column(*which) for which in wanted]
    head = ["kernel", "D", "tensor", "exp", "issue", "shared", "step", "of peak"]
    head += [f"{'causal ' if causal else ''}{length // 1024}k" for causal, length in wanted]
    lines = [_line(head), "|" + "---|" * len(head)]
    for kernel, name in NAMES.items():
        for head_dim in sorted({size for _, size in by_shape}):
            each = by_shape[kernel, head_dim]
            if kernel != "dq":
                shown = [each[unit] for unit in UNITS]
                shown += [f"{float(each['share_of_peak']):.0%}", *(each[c] for c in columns)]
            else:
                other = by_shape["dkdv", head_dim]
                speeds = [5 / (3 / float(each[c]) + 4 / float(other[c])) for c in columns]
                shown = [""] * 6 + [f"{speed:.0f}" for speed in speeds]
            lines.append(_line([name, head_dim, *shown]))
    lines += ["", _line(["not fitted to", "published", "the model", "off by"]), "|---|---|---|---|"]
    for name, published, ours in calibration.held_out():
        off = f"{ours / published - 1:+.0%}"
        lines.append(_line([name, f"{published:.0f}", f"{ours:.0f}", off]))
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


UNITS = ("tensor", "exponentials", "issue", "shared", "step")
NAMES = {"forward": "forward", "dqdkdv": "backward", "dq": "backward, repeatable: two kernels"}


def write_page(page: Path, recorded: Sequence[dict[str, str]]) -> None:
    text = page.read_text()
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{table(recorded)}\n{MARKS[1]}{after}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("module", type=Path, help="a compiled _C with the Hopper kernels")
    parser.add_argument(
        "--save", action="store_true", help="record, and write docs/cuda.md's table"
    )
    options = parser.parse_args(arguments)
    from tests.cases.cuda_code import read_kernels

    with tempfile.TemporaryDirectory() as folder:
        kernels = read_kernels(options.module.resolve(), Path(folder))
    found = rows((kernel.name, kernel.text) for kernel in kernels)
    if not found:
        raise SystemExit(f"{options.module} holds no attention kernels for sm_90a")
    for each in found:
        print(" ".join(f"{key}={value}" for key, value in each.items()))
    for name, published, ours in (*calibration.errors(), *calibration.held_out()):
        print(
            f"{name}: published {published:.0f}, the model {ours:.0f}, {ours / published - 1:+.1%}"
        )
    if options.save:
        save(found, FILE)
        write_page(PAGE, [{key: str(value) for key, value in each.items()} for each in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
