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
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn.runtime.triton import device as triton_device
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases import layer_norm as norm_cases
from tests.cases.attention import Case, run_backend, run_plain, skip_unless_supported
from tests.ops.attention.test_api import CASES
from tests.ops.attention.test_fuzz import random_case

from .guards import guarded
from .watchdog import LEFT_OUT, supervise, work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = {"default": False, "deterministic": True}
RANDOM_CASES = 300
SEEDS = 10  # of the long cases
HEAD_SIZES = (64, 128, 256)  # up to which one set of kernels serves
TRITON = triton_device.BACKEND
SAID_EVERY = 50  # outcomes

# Several tiles of every shipped size, and the lengths at which tensor descriptors are used.
LONG = {
    f"long {kind}, head {head_dim}": Case(
        1, 4, 2, 700, 1100, head_dim, causal="lower_right" if kind == "causal" else False
    )
    for kind in ("full", "causal")
    for head_dim in (64, 96, 128, 192, 256)
} | {
    "long everything": Case(
        1, 4, 2, 600, 900, 128, causal="lower_right", window=(500, 0), padding="mask",
        mask="b1qk", bias="1hqk", alibi=True, softcap=5.0, dropout_p=0.1, weights="average",
    ),
    "decoding": Case(2, 8, 2, 1, 4000, 128, padding="lengths"),
}  # fmt: skip
# For compute-sanitizer, which takes its time: every compiled head size, plain and with operands.
SMALL = {
    f"small {kind}, head {head_dim}": Case(1, 2, 1, 150, 200, head_dim, causal=True, **operands)
    for kind, operands in (
        ("plain", {}),
        ("masks", {"bias": "11qk", "mask": "1hqk", "padding": "holes"}),
    )
    for head_dim in (40, 64, 128, 256)
}
NORM_SHAPES = ((5, 1), (9, 65), (33, 100), (64, 1024), (50, 4096), (20, 8192), (3, 20000))


@dataclasses.dataclass(frozen=True)
class Demands:
    """What is asked of every check."""

    device: str
    repeats: int
    backward: bool


def on_device(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in tensors.items()
    }


def check_attention(case: Case, dtype: torch.dtype, backend: str, demands: Demands) -> None:
    """Raise AssertionError unless results are within the budget and repeat as promised."""
    tensors = on_device(case.tensors(dtype, requires_grad=demands.backward), demands.device)
    skip_unless_supported(case, backend, tensors)
    with guarded() as guards:
        fenced = {name: guards.fenced(x, name) for name, x in tensors.items()}
        check_against_oracle(
            functools.partial(run_backend, case, backend),
            functools.partial(run_plain, case),
            fenced,
            ("out", "lse", "weights"),
            attention_noise,
        )
        first = results(case, backend, fenced)
    for _ in range(demands.repeats - 1):
        for a, b in zip(first, results(case, backend, tensors), strict=True):
            assert a is None or torch.equal(a, b), "two runs differ"


def results(case: Case, backend: str, tensors: dict[str, Tensor]) -> list[Tensor | None]:
    """What must repeat bit by bit: outputs, and gradients of deterministic algorithms."""
    outputs = [x for x in run_backend(case, backend, **tensors) if x is not None]
    wanted = [x for x in tensors.values() if x.requires_grad]
    if not wanted:
        return [*outputs]
    gradients = torch.autograd.grad(outputs[0].sum(), wanted, allow_unused=True)
    return [*outputs, *(gradients if torch.are_deterministic_algorithms_enabled() else ())]


def check_norm(case: norm_cases.Case, dtype: torch.dtype, backend: str, demands: Demands) -> None:
    with torch.device(demands.device):
        dataclasses.replace(case, dtype=dtype).check(backend)


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing to be right.

    Attributes:
        check: raises AssertionError unless it is; takes dtype, backend and demands.
        call: makes the same call of Triton's kernels, with tensors that have no memory.
        modes: of MODES.
        kernels: which of a backend's kernels it runs, without the dtype.
        random: one of the many that are drawn.
    """

    check: Callable[[torch.dtype, str, Demands], None]
    call: Callable[[torch.dtype], None]
    modes: tuple[str, ...]
    kernels: str
    random: bool = False


def attention_check(case: Case, modes: tuple[str, ...], random: bool = False) -> Check:
    size = max(case.head_dim, case.head_dim_v or 0)
    kind = next((str(most) for most in HEAD_SIZES if size <= most), "large")
    check, call = functools.partial(check_attention, case), functools.partial(call_attention, case)
    return Check(check, call, modes, f"attention {kind}", random)


def norm_check(case: norm_cases.Case, modes: tuple[str, ...]) -> Check:
    check, call = functools.partial(check_norm, case), functools.partial(call_norm, case)
    return Check(check, call, modes, "norm")


def call_attention(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward by Triton's kernels, of tensors on "meta"."""
    tensors = on_device(case.tensors(dtype), "meta")
    results(case, TRITON, tensors)


def call_norm(case: norm_cases.Case, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        moved = dataclasses.replace(case, dtype=dtype)
        tensors = moved.tensors()
        outputs = moved.run(TRITON, **tensors)
        grads = [torch.empty_like(x) for x in outputs]
        torch.autograd.grad(outputs, [*tensors.values()], grads, allow_unused=True)


@functools.cache
def all_checks() -> dict[str, Check]:
    """By name, the most telling first."""
    checks: dict[str, Check] = {}
    both = tuple(MODES)
    for name, case in {**LONG, **SMALL, **CASES}.items():
        checks[name] = attention_check(case, both)
    for shape in NORM_SHAPES:
        for residual, dropout_p in ((None, 0.0), ("post", 0.2), ("pre", 0.0)):
            norm = norm_cases.Case(shape, residual=residual, dropout_p=dropout_p)
            checks[f"norm {shape} {residual}"] = norm_check(norm, both[:1])
    for seed in range(1, SEEDS):
        for name, case in LONG.items():
            mode = both[seed % 2 : seed % 2 + 1]
            seeded = attention_check(dataclasses.replace(case, seed=seed), mode, random=True)
            checks[f"{name}, seed {seed}"] = seeded
    for seed in range(RANDOM_CASES):
        mode = both[seed % 2 : seed % 2 + 1]
        checks[f"random {seed}"] = attention_check(random_case(seed)[0], mode, random=True)
    return checks


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
        from .compile import refuse_to_compile

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
