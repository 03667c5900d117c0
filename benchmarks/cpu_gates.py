"""The CPU gates: us against torch, class by class, in one process.

    python benchmarks/cpu_gates.py [--only TEXT] [--threads 1 2] [--avx2] [--save]

Prints each class with the ratio (the fastest peer's time over ours), its gate and its goal, and the
share of the machine's peak, and exits with 1 if a gate of either does not hold, or if a result or
gradient of ours is over the error budget of the tests. Which gates those are, `gates.py` says for
the machine's level of instructions. One thread of CPU time; `--threads 1 2` adds a table of wall
times. `--avx2` forces both sides to AVX2, and takes its gates.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a script: the package beside it is not on the path
    sys.path[0] = str(ROOT)

from benchmarks.gates import GATES, Gate, chosen  # noqa: E402
from benchmarks.suites import run  # noqa: E402
from benchmarks.suites.ceilings import peak_flops  # noqa: E402
from benchmarks.suites.machine import RESULTS, cpu_level, folder_name  # noqa: E402
from benchmarks.suites.peers import PEERS  # noqa: E402
from benchmarks.suites.problem import DTYPES, REFUSED  # noqa: E402
from benchmarks.suites.results import save_rows  # noqa: E402

# What torch itself has; nothing that compiles.
TORCH = ("sdpa-flash", "sdpa-math", "sdpa", "torch", "torch.nn", "torch.nn-fast")
HEADER = (
    f"{'class':<40} {'ours ms':>9} {'peer ms':>9} {'peer':<13} {'ratio':>6} {'gate':>5} {'goal':>5}"
)
# What makes us, torch and its libraries believe in a machine without AVX-512.
AVX2 = {
    "FUSED_ATTN_CPU": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
HOLDS, GOAL = "ok", "goal"


def measure(gate: Gate, threads: int) -> dict[str, object]:
    """Judge and time the case of a gate; its row of the table."""
    result = run.measure(
        gate.suite, gate.problem, PEERS, run.Wanted(peers=TORCH, threads=(threads,))
    )
    row: dict[str, object] = {"class": gate.name, "threads": threads}
    [(clock, (mine, peer))] = run.fits(result).items()
    preferred = next((s for s in result.sides if s.ours and s.verdict != REFUSED), None)
    if preferred is None or preferred.name != mine:  # another of ours must not stand in for it
        return {**row, "verdict": "NONE OF OURS" if preferred is None else preferred.status.upper()}
    if peer is None:
        return {**row, "verdict": "NO PEER"}
    time = result.times[clock][mine]
    seconds, theirs = (result.figure(clock, side) for side in (mine, peer))
    return {
        **row,
        "ours_ms": round(seconds * 1e3, 4),
        "ours_spread": round((time.high - time.low) / time.median, 3),
        "peer_ms": round(theirs * 1e3, 4),
        "peer": peer,
        **judged(gate, threads, seconds, theirs),
    }


def judged(gate: Gate, threads: int, seconds: float, theirs: float) -> dict[str, object]:
    """Ratio, rates and share of times that are right, and whether the gate holds."""
    problem = gate.problem
    flops = problem.flops if problem.bound == "compute" else 0.0
    share = flops / seconds / (threads * peak_flops(problem.dtype)) if flops else 0.0
    ratio = theirs / seconds
    verdict = GOAL if ratio >= gate.goal else HOLDS
    if share < gate.share:
        verdict = f"BELOW {gate.share:.0%} OF THE PEAK"
    if ratio < gate.gate:
        verdict = "BELOW GATE"
    return {
        "ratio": round(ratio, 3),
        "gate": gate.gate,
        "goal": gate.goal,
        "gflops": round(flops / seconds / 1e9, 1),
        "gbytes": round(problem.bytes / seconds / 1e9, 1),
        "share_of_peak": round(share, 3),
        "share_gate": gate.share,
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
        f"{result['peer']:<13} {result['ratio']:6.2f} {result['gate']:5.2f} {result['goal']:5.2f} "
        f"{rate:>12} {share:>7}  {result['verdict']}",
        flush=True,
    )


def _record(threads: int, avx2: bool) -> Path:
    name = f"cpu_gates{'_avx2' if avx2 else ''}{'' if threads == 1 else f'_{threads}_threads'}.csv"
    return RESULTS / folder_name() / name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only classes whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", choices=(1, 2), default=[1],
                        help="a table each: 1 is CPU time, 2 wall time")  # fmt: skip
    parser.add_argument("--avx2", action="store_true", help="both sides without AVX-512")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.avx2 and os.environ.get("FUSED_ATTN_CPU") != "avx2":
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, "-m", "benchmarks.cpu_gates", *given]
        environment = {**os.environ, **AVX2}
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    gates = [gate for gate in chosen(cpu_level(), GATES) if options.only in gate.name]
    if not gates:
        names = "\n  ".join(gate.name for gate in chosen(cpu_level(), GATES))
        parser.error(f"no class contains {options.only!r}; the classes are\n  {names}")
    torch.manual_seed(0)
    print(f"gates of {cpu_level()}")
    for name, dtype in DTYPES.items():
        print(f"peak of {name}: {peak_flops(dtype) / 1e9:.0f} GF/s a thread")
    results = []
    for threads in options.threads:
        clock = "one thread, CPU time" if threads == 1 else "two threads, wall time"
        print(f"\n{clock}\n{HEADER}")
        record = _record(threads, options.avx2)
        if options.save and not options.only:
            record.unlink(missing_ok=True)  # classes that are no more
        for gate in gates:
            results.append(measure(gate, threads))
            _print(results[-1])
            if options.save and "ratio" in results[-1]:
                save_rows(record, [results[-1]], "class")  # a run that is stopped leaves them
        if options.save:
            print(f"recorded in {record.name}")
    failed = [r for r in results if r["threads"] == 1 and r["verdict"] not in (HOLDS, GOAL)]
    print(f"{len(results) - len(failed)} classes hold, {len(failed)} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
