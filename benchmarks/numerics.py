"""Errors against float64, ours beside torch's own functions; the page and the picture of them.

    python -m benchmarks.numerics [--only TEXT] [--save] [--page]

Each operation, dtype and size, forward and every gradient, at each of the CPU's levels that this
machine has. An error is the root mean square of the difference from float64, over the root mean
square of the right numbers. `--page` writes the table of docs/numerics.md and its picture from
what is recorded, and measures nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from benchmarks.gates import LEVELS
from benchmarks.suites.machine import CHECKOUT, RESULTS, cpu_level, folder_name
from benchmarks.suites.results import save_rows
from fused_attn.runtime import native

FILE = "numerics.csv"
PAGE = CHECKOUT / "docs" / "numerics.md"
PICTURE = CHECKOUT / "docs" / "images" / "numerics.png"
MARKS = "<!-- errors: begin -->", "<!-- errors: end -->"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Call = Callable[..., Tensor]


class Case(NamedTuple):
    """A call: shapes of its tensors by name, ours and torch's."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    ours: Call
    theirs: Call


def attention(length: int, head_dim: int, causal: bool) -> Case:
    shape = (1, 2, length, head_dim)
    return Case(
        f"attention {'causal ' if causal else ''}L {length} D {head_dim}",
        dict.fromkeys("qkv", shape),
        lambda q, k, v: fused_attn.attention(q, k, v, causal=causal, backend="cpu"),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    )


def cases() -> list[Case]:
    found = [
        attention(length, head_dim, causal)
        for length in (128, 512, 2048)
        for head_dim in (64, 128)
        for causal in (False, True)
    ]
    for width in (768, 4096):
        found.append(Case(
            f"layer_norm width {width}",
            {"x": (64, width), "weight": (width,), "bias": (width,)},
            lambda x, weight, bias: fused_attn.layer_norm(x, x.shape[-1], weight, bias),
            lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        ))  # fmt: skip
        found.append(Case(
            f"rms_norm width {width}",
            {"x": (64, width), "weight": (width,)},
            lambda x, weight: fused_attn.rms_norm(x, x.shape[-1], weight),
            lambda x, weight: F.rms_norm(x, x.shape[-1:], weight),
        ))  # fmt: skip
    found.append(Case(
        "bias + gelu width 3072",
        {"x": (64, 3072), "bias": (3072,)},
        lambda x, bias: fused_attn.bias_activation(x, bias, activation="gelu"),
        lambda x, bias: F.gelu(x + bias),
    ))  # fmt: skip
    found.append(Case(
        "linear 256 x 768 x 3072",
        {"x": (256, 768), "weight": (3072, 768), "bias": (3072,)},
        lambda x, weight, bias: fused_attn.linear(x, weight, bias, backend="cpu"),
        F.linear,
    ))  # fmt: skip
    return found


def errors(run: Call, tensors: dict[str, Tensor], exact: list[Tensor]) -> list[float]:
    """Of the result and of each gradient."""
    given = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = run(**given)
    out.backward(_gradient_of(out))
    found = [out.detach(), *(x.grad for x in given.values() if x.grad is not None)]
    return [
        float((x.double() - true).norm() / true.norm())
        for x, true in zip(found, exact, strict=True)
    ]


def _gradient_of(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)


def _exact(run: Call, tensors: dict[str, Tensor]) -> list[Tensor]:
    given = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    out = run(**given)
    out.backward(_gradient_of(out))
    return [out.detach(), *(x.grad for x in given.values() if x.grad is not None)]


def rows(only: str) -> Iterator[dict[str, Any]]:
    level = cpu_level()
    for case in cases():
        for name, dtype in DTYPES.items():
            if only not in f"{case.name} {name}":
                continue
            generator = torch.Generator().manual_seed(0)
            tensors = {
                key: torch.randn(shape, generator=generator).to(dtype)
                for key, shape in case.shapes.items()
            }
            exact = _exact(case.theirs, tensors)
            mine, theirs = (errors(run, tensors, exact) for run in (case.ours, case.theirs))
            for what, a, b in zip(("out", *(f"d{key}" for key in tensors)), mine, theirs,
                                  strict=True):  # fmt: skip
                yield {
                    "call": f"{case.name} {name} {what} {level}",
                    "operation": case.name, "dtype": name, "result": what, "level": level,
                    "our_error": f"{a:.3e}", "torch_error": f"{b:.3e}", "ratio": round(a / b, 2),
                }  # fmt: skip


def recorded() -> list[dict[str, str]]:
    """The rows of all machines."""
    found = []
    for path in sorted(RESULTS.glob(f"*/{FILE}")):
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


def table(found: Sequence[dict[str, str]]) -> str:
    """Forward and worst gradient of each call, at the best level of each machine."""
    machines = sorted({row["machine"] for row in found})
    lines = []
    for machine in machines:
        mine = [row for row in found if row["machine"] == machine]
        levels = sorted({row["level"] for row in mine})
        level = next(x for x in reversed(LEVELS) if x in levels)
        lines += [
            f"{machine}, level {level} (recorded too: {', '.join(levels)}); ours / torch's:", "",
            "| call | " + " | ".join(f"{d} out | {d} worst gradient" for d in DTYPES) + " |",
            "|---|" + "---|---|" * len(DTYPES),
        ]  # fmt: skip
        for call in dict.fromkeys(row["operation"] for row in mine):
            cells = []
            for dtype in DTYPES:
                some = [row for row in mine if (row["operation"], row["dtype"], row["level"]) ==
                        (call, dtype, level)]  # fmt: skip
                out = next(row for row in some if row["result"] == "out")
                rest = [row for row in some if row["result"] != "out"]
                worst = max(rest, key=lambda row: float(row["ratio"]))
                cells += [_pair(out), f"{worst['result']} {_pair(worst)}"]
            lines.append(f"| {call} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _pair(row: dict[str, str]) -> str:
    return f"{float(row['our_error']):.1e} / {float(row['torch_error']):.1e}"


def draw(found: Sequence[dict[str, str]]) -> None:
    """Our error over torch's, each result a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.suites.plots import DPI, PALETTE

    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    calls = list(dict.fromkeys(row["operation"] for row in found))
    for number, dtype in enumerate(DTYPES):
        mine = [row for row in found if row["dtype"] == dtype]
        x = [calls.index(row["operation"]) + (number - 1) * 0.2 for row in mine]
        y = [float(row["ratio"]) for row in mine]
        axes.scatter(x, y, s=14, color=PALETTE[number], label=dtype, alpha=0.7)
    axes.axhline(1.0, color="0.4", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("our error / torch's error (log scale)")
    axes.set_xticks(range(len(calls)), calls, rotation=60, ha="right", fontsize=8)
    axes.set_title("Error against float64: output and every gradient, every recorded level")
    axes.legend(title="dtype")
    figure.savefig(PICTURE, dpi=DPI)
    pyplot.close(figure)


def write_page() -> None:
    found = recorded()
    if not found:
        raise SystemExit(
            f"nothing is recorded: run with --save first (benchmarks/results/*/{FILE})"
        )
    text = PAGE.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}")
    draw(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    parser.add_argument("--page", action="store_true", help="write the page from the records")
    parser.add_argument("--here", action="store_true", help="at this process's level alone")
    options = parser.parse_args(arguments)
    if options.page:
        write_page()
        return 0
    if not options.here:
        return max(_at(level, options) for level in native.module().available_cpu_levels())
    for row in rows(options.only):
        print(
            f"{row['call']:<52} {row['our_error']} {row['torch_error']} {row['ratio']:6.2f}",
            flush=True,
        )
        if options.save:
            save_rows(RESULTS / folder_name() / FILE, [row], "call")
    return 0


def _at(level: str, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.numerics", "--here", "--only", options.only]
    command += ["--save"] if options.save else []
    environment = {**os.environ, "FUSED_ATTN_CPU": level}
    return subprocess.run(command, env=environment, cwd=CHECKOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
