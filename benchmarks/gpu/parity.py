"""Parity of GPU backends on the device: the tests' attention and norm cases, and longer ones.

    python -m benchmarks.gpu.parity BACKEND... [--match TEXT] [--dtypes ...] [--device cpu] [...]

Results and gradients are held against the float64 oracle, with deterministic algorithms and
without; what promises to repeat is run again and compared bit by bit; inputs and results lie
between guard bands, and results start as NaN. Checks run in worker processes under a watchdog: one
that hangs is killed and named. `--device cpu`, with TRITON_INTERPRET=1 or FUSED_ATTN_EMULATOR,
needs no GPU.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .checks import DTYPES, MODES, Demands, all_checks
from .compile import SAID_EVERY, refuse_to_compile
from .watchdog import LEFT_OUT, supervise, work


def family(name: str) -> str:
    """The kernels of a check: where some of them hang or die, the others will."""
    backend, check, dtype, _ = name.split(" | ")
    return f"{backend} {all_checks()[check].kernels} {DTYPES[dtype].itemsize} bytes"


def chosen(options: argparse.Namespace) -> list[str]:
    """`backend | check | dtype | mode` of everything to run."""
    return [
        " | ".join((backend, name, dtype, mode))
        for name, check in all_checks().items()
        if options.match in name and not (options.exactly and options.exactly != name)
        for backend in options.backends
        for dtype in options.dtypes
        for mode in check.modes
        if mode in options.modes
    ]


def run_one(name: str, options: argparse.Namespace) -> tuple[str, str]:
    """(kind, text) of an outcome; ends the process if the device is lost to it."""
    backend, check, dtype, mode = name.split(" | ")
    if options.inject:
        inject(*options.inject, check)
    demands = Demands(options.device, options.repeats, not options.forward_only)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(MODES[mode], warn_only=True)
    try:
        all_checks()[check].check(DTYPES[dtype], backend, demands)
    except pytest.skip.Exception as reason:
        return "skipped", str(reason)
    except Exception as error:  # one kernel's fault must not hide another's
        text = f"{type(error).__name__}: {error}"
        if options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:  # the context is gone: the next check needs another process
                print(f"{name}: {text}", file=sys.stderr, flush=True)
                raise SystemExit(3) from None
        return "failed", text
    finally:
        torch.use_deterministic_algorithms(False)
    return "passed", ""


def inject(what: str, where: str, check: str) -> None:
    """For the runner's own tests: a hang, a failure or a death in the check called `where`."""
    if check != where:
        return
    if what == "hang":
        time.sleep(1e6)
    if what == "die":
        raise SystemExit(9)
    raise AssertionError("injected")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--match", default="", help="only checks whose name contains this")
    parser.add_argument("--exactly", default="", help="only the check of this name")
    parser.add_argument("--repeats", type=int, default=2, help="runs to compare bit by bit")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--case-limit", type=float, default=30.0, help="seconds for one check")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all checks")
    parser.add_argument("--workers", type=int, default=1, help="processes that check")
    parser.add_argument("--in-process", action="store_true", help="no workers: for sanitizers")
    parser.add_argument(
        "--no-compiling", action="store_true", help="what is not in Triton's cache on disk fails"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--inject", nargs=2, metavar=("WHAT", "CHECK"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    run = functools.partial(run_one, options=options)
    if options.worker:
        work(sys.stdin, lambda name: guard_failures(run, name))
        return 0
    names = chosen(options)
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()

    def summary() -> str:
        left = len(names) - counts.total()
        return (
            f"{counts['passed']} passed, {counts['failed']} failed, {counts['hung']} hung, "
            f"{counts['died']} died, {counts['skipped']} not supported, "
            f"{counts[LEFT_OUT]} left out, {left} not begun in time, "
            f"{time.monotonic() - start:.0f} s"
        )

    with kept(options) as keep:
        for name, kind, text in outcomes(names, options, run):
            counts[kind] += 1
            keep(name, kind, text)
            if kind not in ("passed", "skipped", LEFT_OUT):
                print(f"{kind.upper()} {name}: {text}", flush=True)
            if counts.total() % SAID_EVERY == 0:  # who is stopped has said how far it came
                print(summary(), flush=True)
    print(summary())
    wrong = counts["failed"] + counts["hung"] + counts["died"]
    return 1 if wrong or not counts["passed"] else 0


@contextlib.contextmanager
def kept(options: argparse.Namespace) -> Iterator[Callable[..., None]]:
    """Within this, outcomes go to a file of FUSED_ATTN_RESULTS as they come, if that is set."""
    folder = os.environ.get("FUSED_ATTN_RESULTS")
    if not folder:
        yield lambda *row: None
        return
    with (Path(folder) / f"parity-{'-'.join(options.backends)}.csv").open("a", newline="") as file:
        writer = csv.writer(file)

        def keep(*row: str) -> None:
            writer.writerow(row)
            file.flush()

        yield keep


def guard_failures(run: Callable[[str], tuple[str, str]], name: str) -> tuple[str, str]:
    try:
        return run(name)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"


def outcomes(names, options, run):
    """(name, kind, text) of each, here or in workers."""
    if options.no_compiling:
        refuse_to_compile()
    if options.in_process:
        for name in names:
            yield name, *guard_failures(run, name)
        return
    command = (sys.executable, "-m", "benchmarks.gpu.parity", *sys.argv[1:], "--worker")
    watched = (options.case_limit, options.budget, options.workers, family)
    for outcome in supervise(names, command, *watched):
        yield outcome.name, outcome.kind, outcome.text


if __name__ == "__main__":
    sys.exit(main())
