"""Compile what the parity checks will launch, by many processes into Triton's one cache on disk.

    python -m benchmarks.gpu.compile [--jobs 16] [--arch 90] [--match TEXT] [--dtypes ...]

The same calls are made with tensors that have no memory, so nothing runs on a GPU and none is
needed; the processes that check then read the cache. What the budget does not reach is said.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from fused_attn.ops import dispatch
from fused_attn.runtime.triton import device as triton_device

from .checks import DTYPES, all_checks

SAID_EVERY = 50  # outcomes


def names(match: str, dtypes: list[str]) -> list[str]:
    """`check | dtype` of everything but the random checks, the most telling first."""
    return [
        f"{name} | {dtype}"
        for name, check in all_checks().items()
        if match in name and not check.random
        for dtype in dtypes
    ]


@contextlib.contextmanager
def watching_the_cache() -> Iterator[dict[str, int]]:
    """Within this: how many kernels were "compiled", and how many were "found" on disk."""
    from triton import knobs

    counts = {"compiled": 0, "found": 0}

    def note(*, cache_hit: bool, **rest: Any) -> None:
        counts["found" if cache_hit else "compiled"] += 1

    before, knobs.compilation.listener = knobs.compilation.listener, note
    try:
        yield counts
    finally:
        knobs.compilation.listener = before


def compile_one(arch: int | str, name: str) -> tuple[dict[str, int], str]:
    """(what was compiled and what was there, what went wrong or "")."""
    check, _, dtype = name.partition(" | ")
    with watching_the_cache() as counts:
        try:
            with triton_device.compiling_for(arch, _compile_with_launcher, 0):
                all_checks()[check].call(DTYPES[dtype])
        except dispatch.UnsupportedError:
            return counts, ""
        except Exception as error:  # one kernel's fault must not hide another's
            return counts, f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            dispatch.forget_plans()  # they say that tensors without a device can be run
    return counts, ""


def _compile_with_launcher(wanted: triton_device.Wanted) -> None:
    """A kernel, and what calls it: up to Triton 3.6 that is C code, a compiler's work as well."""
    compiled = wanted.compile()
    if torch.cuda.is_available():
        from triton.runtime import driver

        driver.active.launcher_cls(compiled.src, compiled.metadata)


def refuse_to_compile() -> None:
    """From now on a kernel that is not in the cache is an error: a sanitizer would take minutes."""
    from triton.backends.nvidia.compiler import CUDABackend

    def refuse(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("this kernel was not compiled beforehand: see benchmarks/gpu/compile.py")

    CUDABackend.add_stages = refuse


def compile_all(arch: int | str, wanted: list[str], jobs: int, budget: float) -> int:
    """By `jobs` processes; 0 if nothing went wrong and nothing was left."""
    start, done, wrong = time.monotonic(), 0, 0
    counts = {"compiled": 0, "found": 0}
    fresh = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=fresh)
    tasks = {pool.submit(functools.partial(compile_one, arch), name): name for name in wanted}
    with contextlib.suppress(concurrent.futures.TimeoutError):
        for task in concurrent.futures.as_completed(tasks, timeout=budget):
            done += 1
            if task.exception() is not None:
                found, fault = {}, f"the process died: {task.exception()}"
            else:
                found, fault = task.result()
            for kind, count in found.items():
                counts[kind] += count
            if fault:
                wrong += 1
                print(f"{tasks[task]}: {fault}", flush=True)
            if done % SAID_EVERY == 0:
                print(f"{done} of {len(wanted)} calls, {counts}", flush=True)
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    print(
        f"{counts['compiled']} kernels compiled, {counts['found']} were there; {done} calls, "
        f"{wrong} failed, {len(wanted) - done} not reached, {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong or done < len(wanted) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--arch", type=int, help="compute capability; default: that of the GPU")
    parser.add_argument("--match", default="", help="only checks whose name contains this")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES),
                        choices=list(DTYPES))  # fmt: skip
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for everything")
    options = parser.parse_args(arguments)
    arch = options.arch or triton_device.arch(torch.device("cuda"))
    return compile_all(arch, names(options.match, options.dtypes), options.jobs, options.budget)


if __name__ == "__main__":
    sys.exit(main())
