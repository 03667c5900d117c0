"""How everything is timed: all sides in one process, turn by turn, medians with their spread.

These machines are shared. One thread of CPU time (`time.thread_time`) hardly notices neighbours;
wall time over several threads does, and so reports its minimum as well. Ratios come from samples
taken in turn, so that a slow minute hits both sides.
"""

from __future__ import annotations

import csv
import datetime
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_attn import __version__, native

RESULTS = Path(__file__).parent / "results"

MIN_SAMPLE_SECONDS = 0.02
ROUNDS = 9


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the samples, the smallest, and the quartiles."""

    median: float
    minimum: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, min(samples), low, high)


def time_in_turn(
    sides: Mapping[str, Callable[[], object]], threads: int = 1, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Time the functions of `sides`, one sample of each in every round.

    Args:
        sides: functions by name; each is called a few times a sample, so that a sample takes at
            least `MIN_SAMPLE_SECONDS`.
        threads: 1 measures CPU time of this thread, more measure wall time with torch set to as
            many threads.
        rounds: number of samples a side.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        repeats = {name: _repeats(function, clock) for name, function in sides.items()}
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, function in sides.items():
                start = clock()
                for _ in range(repeats[name]):
                    function()
                samples[name].append((clock() - start) / repeats[name])
    finally:
        torch.set_num_threads(before)
    return {name: Timing.of(values) for name, values in samples.items()}


def _repeats(function: Callable[[], object], clock: Callable[[], float]) -> int:
    """How often to call `function` in a sample; warms it up on the way."""
    function()
    start, count = clock(), 0
    while clock() - start < MIN_SAMPLE_SECONDS:
        function()
        count += 1
    return max(1, count)


@functools.cache
def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of one thread doing nothing but multiply-adds in the arithmetic of `dtype`.

    The best of a few measurements: a ceiling, not a typical speed.
    """
    multiply_adds, name = native.module().multiply_adds, str(dtype)[6:]
    repeats, rates = 1_000_000, []
    multiply_adds(name, repeats)
    for _ in range(ROUNDS):
        start = time.thread_time()
        operations = multiply_adds(name, repeats)
        rates.append(operations / (time.thread_time() - start))
    return max(rates)


def environment() -> dict[str, str]:
    """What a figure is worth nothing without: machine, versions, commit, date."""
    return {
        "cpu": _cpu_name(),
        "cpu_level": str(native.module().cpu_level()) if native.why_not() is None else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_attn": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine_name() -> str:
    """Name of the machine's folder under `benchmarks/results/`."""
    words = _cpu_name().lower().replace("(r)", "").replace("(tm)", "").split()
    return "-".join("".join(c for c in word if c.isalnum()) for word in words) or "unknown"


def save_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write `rows` to a CSV file, each with the environment beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = environment()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *facts])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, **facts})


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    fields = {}
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.processor() or platform.machine())
    family = fields.get("cpu family")
    return f"{name} family {family}" if family else name


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.stdout.strip() or "unknown"
