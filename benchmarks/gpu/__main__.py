"""`make gpu`: build on this machine, prove the kernels on the card, measure, print one table.

    python -m benchmarks.gpu [--only PART ...] [--budget SECONDS]

Each part is a process of its own with a time limit: one that hangs or fails is reported, and the
next one runs. Logs and figures go to `benchmarks/results/<gpu>/`; nothing is fetched from anywhere.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import machine, table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """One step: its command, and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit: int
    environment: tuple[tuple[str, str], ...] = ()
    advisory: bool = False  # failing, it is shown and does not count


def parity(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.gpu.parity", *arguments)


def measure(part: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.gpu.measure", part)


def sanitizer(tool: str, *arguments: str) -> tuple[str, ...]:
    return (
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
        *parity(*arguments, "--in-process", "--match", "small", "--dtypes", "bf16"),
        *("--repeats", "1"),
    )


# The most telling first: what the budget does not reach is left out, and said to be.
PARTS = (
    Part("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 150,
         (("FUSED_ATTN_NATIVE", "on"), ("FUSED_ATTN_CUDA", "on"),
          ("FUSED_ATTN_CUDA_ARCHS", "80;90a"))),
    Part("info", (sys.executable, "-m", "fused_attn", "info"), 30),
    Part("parity-cuda", parity("cuda", "--case-limit", "15", "--budget", "90"), 110),
    Part("launches", (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                      "tests/cuda/test_kernels.py"), 60),
    Part("repeat", parity("cuda", "triton", "--match", "long", "--modes", "deterministic",
                          "--dtypes", "bf16", "--repeats", "20", "--budget", "25"), 40),
    Part("ceilings", measure("ceilings"), 30),
    Part("attention", measure("attention"), 160),
    Part("deterministic", measure("deterministic"), 45),
    Part("memcheck", sanitizer("memcheck", "cuda", "triton"), 50),
    # Its reports on copies that no tensor map describes, the backward's row statistics, are false:
    # the forward is judged here, the backward's log is to be read.
    Part("racecheck", sanitizer("racecheck", "cuda", "--forward-only"), 30),
    Part("parity-triton", parity("triton", "--case-limit", "60", "--budget", "90"), 110),
    Part("norms", measure("norms"), 70),
    Part("masks", measure("masks"), 90),
    Part("decode", measure("decode"), 45),
    Part("overhead", measure("overhead"), 65),
    Part("modules", measure("modules"), 80),
    Part("racecheck-backward", sanitizer("racecheck", "cuda"), 30, advisory=True),
    Part("ptxas", (sys.executable, "-m", "benchmarks.compiler.ptxas"), 150),
)  # fmt: skip


def run(part: Part, folder: Path, limit: float) -> str:
    """Run one part; returns "ok", "failed (exit code)" or "took longer than ..."."""
    log = folder / f"{part.name}.log"
    environment = {**os.environ, **dict(part.environment), "FUSED_ATTN_RESULTS": str(folder)}
    print(f"[{part.name}] ...", end=" ", flush=True)
    start = time.monotonic()
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            print(outcome := f"{part.command[0]} is not there", flush=True)
            return outcome
        try:
            code = process.wait(timeout=limit)
            outcome = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"took longer than {limit:.0f} s"
    print(f"{outcome}, {time.monotonic() - start:.0f} s", flush=True)
    if outcome != "ok":
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-12:]))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    options = parser.parse_args()
    reason = machine.why_not()
    if reason is not None:
        print(f"make gpu: {reason}")
        return 1
    folder = machine.results_folder()
    machine.write(folder)
    end = time.monotonic() + options.budget
    outcomes = {}
    for part in PARTS:
        if part.name not in options.only:
            continue
        left = end - time.monotonic()
        if left < 10:
            outcomes[part.name] = "no time left"
            continue
        outcomes[part.name] = run(part, folder, min(part.limit, left))
    print(table.render(folder, outcomes))
    judged = {part.name for part in PARTS if not part.advisory}
    return 0 if all(outcomes[name] == "ok" for name in judged & outcomes.keys()) else 1


if __name__ == "__main__":
    sys.exit(main())
