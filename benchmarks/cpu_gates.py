"""The CPU gates: us against torch, class by class, in one process.

    python benchmarks/cpu_gates.py [--only TEXT] [--threads 1 2] [--avx2] [--save]

Prints each class with the ratio (the fastest peer's time over ours), its gate and its goal, and the
share of the machine's peak, and exits with 1 if a gate of either does not hold, or if a result or
gradient has more than twice the error of plain PyTorch (and one rounding). One thread of CPU time;
`--threads 1 2` adds a table of wall times. `--avx2` forces both sides to AVX2, every gate being 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys

import torch
from cpu import ROWS
from cpu.row import SHORT_NAMES, Row

from .suites.ceilings import peak_flops
from .suites.machine import RESULTS
from .suites.machine import folder_name as machine_name
from .suites.results import save_rows
from .suites.timing import Timing, time_in_turn

HEADER = (
    f"{'class':<44} {'ours ms':>9} {'peer ms':>9} {'peer':<12} {'ratio':>6} {'gate':>5} {'goal':>5}"
)

# What makes us, torch and its libraries believe in a machine without AVX-512.
AVX2 = {
    "FUSED_ATTN_CPU": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def measure(row: Row, threads: int) -> dict[str, object]:
    sides = row.build()
    ours = sides["ours"]
    error = ours.check()
    if error is not None:
        return {"class": row.name, "threads": threads, "verdict": f"WRONG: {error}"}
    functions = {name: side.run for name, side in sides.items()}
    times = time_in_turn(functions, threads)
    return {"class": row.name, "threads": threads, **_figures(row, times, threads)}


def _figures(row: Row, times: dict[str, Timing], threads: int) -> dict[str, object]:
    # Wall times of several threads on a shared machine are only worth their minimum.
    seconds = {name: t.median if threads == 1 else t.minimum for name, t in times.items()}
    ours = times["ours"]
    peer = min((name for name in seconds if name != "ours"), key=seconds.__getitem__)
    ratio = seconds[peer] / seconds["ours"]
    share = row.flops / seconds["ours"] / (threads * peak_flops(row.dtype))
    verdict = "goal" if ratio >= row.goal else "ok"
    if ratio < row.gate or share < row.share_gate:
        verdict = "BELOW GATE" if ratio < row.gate else f"BELOW {row.share_gate:.0%} OF THE PEAK"
    return {
        "ours_ms": round(seconds["ours"] * 1e3, 4),
        "ours_spread": round((ours.high - ours.low) / ours.median, 3),
        "peer_ms": round(seconds[peer] * 1e3, 4),
        "peer": peer,
        "ratio": round(ratio, 3),
        "gate": row.gate,
        "goal": row.goal,
        "gflops": round(row.flops / seconds["ours"] / 1e9, 1),
        "gbytes": round(row.bytes / seconds["ours"] / 1e9, 1),
        "share_of_peak": round(share, 3),
        "share_gate": row.share_gate,
        "verdict": verdict,
    }


def _print(result: dict[str, object]) -> None:
    if "ratio" not in result:
        print(f"{result['class']:<40} {result['verdict']}", flush=True)
        return
    rate = share = ""
    if result["gflops"]:
        rate, share = f"{result['gflops']} GF/s", f"{result['share_of_peak']:.0%}"
    elif result["gbytes"]:
        rate = f"{result['gbytes']} GB/s"
    print(
        f"{result['class']:<40} {result['ours_ms']:9.3f} {result['peer_ms']:9.3f} "
        f"{result['peer']:<11} {result['ratio']:6.2f} {result['gate']:5.2f} {result['goal']:5.2f} "
        f"{rate:>12} {share:>7}  {result['verdict']}",
        flush=True,
    )


def _save(results: list[dict[str, object]], threads: int, avx2: bool, whole: bool) -> None:
    complete = [result for result in results if "ratio" in result]
    name = f"cpu_gates{'_avx2' if avx2 else ''}{'' if threads == 1 else f'_{threads}_threads'}.csv"
    path = RESULTS / machine_name() / name
    if whole:
        path.unlink(missing_ok=True)  # classes that are no more
    save_rows(path, complete, "class")
    print(f"recorded {len(complete)} classes in {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only classes whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", choices=(1, 2), default=[1],
                        help="a table each: 1 is CPU time, 2 wall time")  # fmt: skip
    parser.add_argument("--avx2", action="store_true", help="both sides without AVX-512")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.avx2 and os.environ.get("FUSED_ATTN_CPU") != "avx2":
        command = [sys.executable, *sys.argv]
        return subprocess.run(command, env={**os.environ, **AVX2}, check=False).returncode
    rows = [row for row in ROWS if arguments.only in row.name]
    if arguments.avx2:
        rows = [
            dataclasses.replace(r, gate=min(r.gate, 1.0), goal=min(r.goal, 1.0), share_gate=0.0)
            for r in rows
        ]
    if not rows:
        names = "\n  ".join(row.name for row in ROWS)
        parser.error(f"no class contains {arguments.only!r}; the classes are\n  {names}")
    torch.manual_seed(0)
    for dtype, name in SHORT_NAMES.items():
        print(f"peak of {name}: {peak_flops(dtype) / 1e9:.0f} GF/s a thread")
    results = []
    for threads in arguments.threads:
        clock = "one thread, CPU time" if threads == 1 else "two threads, wall time"
        print(f"\n{clock}\n{HEADER}")
        for row in rows:
            results.append(measure(row, threads))
            _print(results[-1])
        if arguments.save:
            taken = [r for r in results if r["threads"] == threads]
            _save(taken, threads, arguments.avx2, whole=not arguments.only)
    failed = [r for r in results if r["threads"] == 1 and r["verdict"] not in ("ok", "goal")]
    print(f"{len(results) - len(failed)} classes hold, {len(failed)} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
