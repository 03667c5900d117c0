"""The suites under pytest-benchmark: the same cases and sides, timed if they are right."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from benchmarks import pytest_suites
from benchmarks.suites.operations.attention import Attention
from benchmarks.suites.suites import SUITES, find
from tests.cases.bench import TOY, quick  # noqa: F401


class PretendedBenchmark:
    """What of pytest-benchmark's fixture is used."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.calls = 0

    def pedantic(self, function, rounds: int, warmup_rounds: int, iterations: int) -> None:
        for _ in range(rounds * iterations + warmup_rounds):
            function()
            self.calls += 1


@pytest.mark.parametrize("direction", ["forward", "backward", "training"])
def test_a_side_that_is_right_is_timed(direction: str) -> None:
    benchmark, problem = PretendedBenchmark(), TOY.replace(direction=direction)
    pytest_suites.test_suite(benchmark, find("forward"), problem, "sdpa-math")
    assert benchmark.calls == pytest_suites.ROUNDS + pytest_suites.WARMUP
    assert benchmark.extra_info == {
        "side": "sdpa-math", "flops": problem.flops, "bytes": problem.bytes
    }  # fmt: skip


def test_a_side_that_is_wrong_fails_and_one_that_is_refused_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = Attention.ours

    def ours(self, tensors):
        def wrong(side):
            def prepare(inputs):
                made = side.prepare(inputs)
                return dataclasses.replace(made, forward=lambda: made.forward() + 1e-3)

            return dataclasses.replace(side, prepare=prepare, by_name="")

        return [wrong(side) for side in honest(self, tensors)]

    with pytest.raises(pytest.skip.Exception, match="refused: is the oracle"):
        pytest_suites.test_suite(PretendedBenchmark(), find("forward"), TOY, "fused_attn:reference")
    monkeypatch.setattr(Attention, "ours", ours)
    with pytest.raises(AssertionError, match="out: error"):
        pytest_suites.test_suite(PretendedBenchmark(), find("forward"), TOY, "fused_attn:reference")


def test_every_quick_case_has_all_its_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str, str]] = []

    def parametrize(names: tuple[str, ...], cases) -> None:
        found.extend((c.values[0].name, c.values[1].label, c.values[2]) for c in cases)

    pytest_suites.pytest_generate_tests(SimpleNamespace(parametrize=parametrize))
    assert len(set(found)) == len(found)
    assert {suite for suite, _, _ in found} == {suite.name for suite in SUITES}
    sides = {side for suite, _, side in found if suite == "decode"}
    assert {"fused_attn:cpu", "fused_attn:reference", "sdpa-flash", "flex"} <= sides
