"""The suites under pytest-benchmark: `pytest benchmarks --benchmark-only`.

The cases, the sides and the check against float64 are those of `python -m benchmarks`, which
also takes sides in turn, measures memory and records machines; here pytest-benchmark has its own
statistics, storage and comparison. Times are wall times; on a GPU until the device is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .suites import run
from .suites.judge import Judge
from .suites.peers import PEERS
from .suites.problem import DTYPES, Problem, step, with_flags
from .suites.suites import Suite, find

WANTED = run.Wanted(quick=True)
ROUNDS, WARMUP = 7, 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    dtypes = [DTYPES[name] for name in option("dtype")]
    cases = []
    for name in option("suites"):
        suite = find(name)
        for problem in suite.problems(option("device"), dtypes, option("shapes"), quick=True):
            sides = [s.name for s in run.sides_of(problem, problem.tensors(), PEERS, WANTED)]
            cases += [
                pytest.param(suite, problem, side, id=f"{name}-{problem.label}-{side}")
                for side in sides
            ]
    metafunc.parametrize(("suite", "problem", "side"), cases)


def test_suite(benchmark: Any, suite: Suite, problem: Problem, side: str) -> None:
    with torch.set_grad_enabled(problem.wants_gradient):
        judge = Judge(problem)
        found = {s.name: s for s in run.sides_of(judge.problem, judge.tensors, PEERS, WANTED)}[side]
        if found.status != run.OK:
            pytest.skip(found.status)
        wrong = judge.verdict(found.prepare)
        assert wrong is None, wrong
        function = _timed(problem, side)
        benchmark.group = f"{suite.name}: {problem.label}"
        benchmark.extra_info.update(side=side, flops=problem.flops, bytes=problem.bytes)
        once = problem.operation == "import"
        benchmark.pedantic(
            function, rounds=2 if once else ROUNDS, warmup_rounds=0 if once else WARMUP
        )


def _timed(problem: Problem, side: str) -> Callable[[], object]:
    tensors = with_flags(problem, problem.tensors())
    sides = {s.name: s for s in run.sides_of(problem, tensors, PEERS, WANTED)}
    call = sides[side].prepare(tensors)
    dout = None
    if problem.wants_gradient:
        dout = problem.output_gradient(call.restore("out", call.main().detach()))
    function = step(problem, call, dout)
    if problem.device != "cuda":
        return function

    def until_done() -> None:
        function()
        torch.cuda.synchronize()

    return until_done
