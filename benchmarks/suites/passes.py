"""A run's passes over all cases, each in a process of its own.

Two runs differ in more than the samples of one show: by the minute (the clock of the cores,
neighbours) and by the process (the pages and addresses that it is given). Passes see that as runs
do. A spread without it would promise too much.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from . import peers, run
from .judge import first_line
from .problem import Problem
from .run import Again, Result, Wanted
from .suites import Suite, find

Cases = Sequence[tuple[Suite, Problem]]


def first(cases: Cases, wanted: Wanted, end: float) -> Iterator[Result]:
    """Judge and measure each case, in this process, until `end` (of `time.monotonic`)."""
    for suite, problem in cases:
        if time.monotonic() > end:
            return
        try:
            yield run.measure(suite, problem, peers.PEERS, wanted)
        except Exception as error:  # the case itself: no memory for its inputs, say
            yield run.broken(suite, problem, error)


def later(found: Sequence[Result], wanted: Wanted, end: float) -> Iterator[int]:
    """Time in a new process what has times; yields the number of each case that is done.

    A case at which the process dies loses its figures, and the pass ends.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would have this process's memory
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as worker:
        for i, result in enumerate(found):
            if time.monotonic() > end:
                return
            names = result.timed()
            asked = worker.submit(_again, result.suite, result.problem, names, wanted)
            try:
                result.add(asked.result())
            except Exception as error:
                status = f"{run.FAILED}: {first_line(error)}"
                result.add(Again({}, {name: status for sides in names.values() for name in sides}))
                if isinstance(error, BrokenProcessPool):
                    yield i
                    return
            yield i


def _again(suite: str, problem: Problem, names: dict[str, list[str]], wanted: Wanted) -> Again:
    return run.time_again(find(suite), problem, names, peers.PEERS, wanted)
