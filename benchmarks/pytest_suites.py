"""The suites' quick cases under pytest-benchmark, with its statistics, storage and comparison.

    pytest benchmarks/pytest_suites.py --benchmark-only -k "decode and fp32 and fused_attn"

Cases, sides and the check against float64 are those of `python -m benchmarks`. Times are wall
times, on a GPU until the device is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.suites import run
from benchmarks.suites.judge import Judge
from benchmarks.suites.peers import PEERS
from benchmarks.suites.problem import Problem, Side
from benchmarks.suites.suites import SUITES, Suite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, WARMUP, TINY_CALLS = 7, 2, 100


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param(suite, problem, side, id=f"{suite.name}-{problem.label}-{side}")
        for suite in SUITES
        for problem in suite.problems(DEVICE, quick=True)
        for side in side_names(suite)
    ]
    metafunc.parametrize(("suite", "problem", "side"), cases)


def side_names(suite: Suite) -> list[str]:
    """All that a suite may have, asked of a problem that costs nothing."""
    problem = suite.problems(DEVICE, wanted=suite.toy)[0]
    return list(sides_of(problem, problem.tensors()))


def sides_of(problem: Problem, tensors: dict[str, torch.Tensor]) -> dict[str, Side]:
    wanted = run.Wanted(quick=True)
    return {side.name: side for side in run.sides_of(problem, tensors, PEERS, wanted)}


def test_suite(benchmark: Any, suite: Suite, problem: Problem, side: str) -> None:
    with torch.set_grad_enabled(problem.wants_gradient):
        judge = Judge(problem)
        judged = sides_of(judge.problem, judge.tensors)[side]
        if judged.status != run.OK:
            pytest.skip(judged.status)
        wrong = judge.verdict(judged.prepare)
        assert wrong is None, wrong
        tensors = problem.tensors()
        function = run.step_of(problem, sides_of(problem, tensors)[side], tensors)
        benchmark.group = f"{suite.name}: {problem.label}"
        benchmark.extra_info.update(side=side, flops=problem.flops, bytes=problem.bytes)
        rounds, warmup = (2, 0) if problem.operation == "import" else (ROUNDS, WARMUP)
        timed = functools.partial(until_done, function) if DEVICE == "cuda" else function
        calls = TINY_CALLS if suite.launches else 1
        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=warmup, iterations=calls)


def until_done(function: Callable[[], object]) -> None:
    function()
    torch.cuda.synchronize()
