"""Random calls from the command line.

    python -m fused_attn.testing fuzz [--op all] [--backend all] [--cases 200] [--seed 0]

Every call is judged against float64 by the error budget. A failure is made as small as it stays a
failure, and printed with the line that repeats it. Ends with 1 if there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .._version import __version__
from .fuzz import run


@contextlib.contextmanager
def _progress(total: int, name: str) -> Iterator[Callable[[], Any] | None]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=name, leave=False, disable=None) as bar:
        yield bar.update


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Operations and backends that can run here; says of the others why they cannot."""
    for op in run.OPERATIONS if options.op == "all" else (options.op,):
        for backend in (
            run.backends_of(op, False) if options.backend == "all" else (options.backend,)
        ):
            reason = run.why_not(op, backend, options.device)
            if reason is None:
                yield op, backend
            else:
                print(f"{op:<16} {backend:<10} not here: {reason}")


def _repeat(options: argparse.Namespace) -> int:
    try:
        case = json.loads(options.repeat)
        if not isinstance(case, dict):
            raise ValueError("it must be an object")
        served = run.check(options.op, options.backend, case, options.device)
    except AssertionError as error:
        print(f"still wrong: {error}")
        return 1
    except (ValueError, KeyError) as error:
        raise SystemExit(f"--repeat: {error}") from error
    print("right" if served else "the backend does not serve this call")
    return 0


def _fuzz(options: argparse.Namespace) -> int:
    wrong = 0
    for op, backend in _chosen(options):
        with _progress(options.cases, f"{op} {backend}") as tell:
            tried, refused, found = run.fuzz(
                op, backend, options.cases, options.seed, options.device, tell
            )
        line = f"{op:<16} {backend:<10} {tried} cases, {refused} not served, {len(found)} wrong"
        print(f"{line} (seed {options.seed})", flush=True)
        for failure in found:
            print(f"\n{failure.message}\n{failure.repeat}\n", flush=True)
        wrong += len(found)
    return 1 if wrong else 0


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_attn.testing")
    commands = parser.add_subparsers(dest="command", required=True)
    fuzz = commands.add_parser("fuzz", help="random calls against float64")
    fuzz.add_argument("--op", default="all", choices=("all", *run.OPERATIONS))
    fuzz.add_argument("--backend", default="all")
    fuzz.add_argument("--cases", type=_number, default=200)
    fuzz.add_argument("--seed", type=_number, default=0)
    fuzz.add_argument("--device", default="cpu")
    fuzz.add_argument("--repeat", metavar="CASE", help="one case, as a failure prints it")
    fuzz.add_argument("--version", help="which version printed the case")
    options = parser.parse_args(arguments)
    if options.version not in (None, __version__):
        print(f"the case is of version {options.version}, this is {__version__}: it may be another "
              f"call here", file=sys.stderr)  # fmt: skip
    if options.repeat is not None:
        if "all" in (options.op, options.backend):
            parser.error("--repeat wants --op and --backend")
        return _repeat(options)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    try:
        return _fuzz(options)
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
