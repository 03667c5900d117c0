"""A run's passes: their samples together, what fails in a later one, time that ends in one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.suites import cli, passes, results, run
from benchmarks.suites.suites import find
from tests.cases.bench import TOY, bench, peer, quick  # noqa: F401


def test_later_passes_add_samples_and_find_what_fails_by_then() -> None:
    broken: list[str] = []

    def unless_broken(out: torch.Tensor) -> torch.Tensor:
        if broken:
            raise RuntimeError(*broken)
        return out

    wanted = run.Wanted(backends=("reference",), rounds=4, passes=2)
    theirs = [peer("it"), peer("late", unless_broken)]
    result = run.measure(find("forward"), TOY, theirs, wanted)
    memory_before = dict(result.memory)
    [times] = result.times.values()
    assert {name: t.samples for name, t in times.items()} == {
        "fused_attn:reference": 2, "it": 2, "late": 2,
    }  # fmt: skip
    broken.append("no more")
    result.add(run.time_again(find("forward"), TOY, result.timed(), theirs, wanted))
    [times] = result.times.values()
    assert {name: t.samples for name, t in times.items()} == {"fused_attn:reference": 4, "it": 4}
    assert times["it"].minimum == min(times["it"].values)
    assert result.memory == memory_before
    [status] = [side.status for side in result.sides if side.name == "late"]
    assert status == "failed: RuntimeError: no more"


def test_time_that_ends_in_a_later_pass_leaves_nothing_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--shapes", "toy,full", "toy,causal", "--dtype", "fp32", "--peers", "none"]
    clock = iter(range(100))
    for module in (cli, passes):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    options += ["--backends", "reference", "--rounds", "6", "--passes", "3", "--budget", "4"]
    assert bench("forward", *options, "--save", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "pass 2 of 3, 2 cases" in text
    assert "pass 3" not in text
    assert "not measured" not in text
    assert sorted(row["samples"] for row in results.read(tmp_path)) == ["2", "4"]


def die(*arguments: object) -> None:
    os._exit(3)


def test_a_case_at_which_a_later_pass_dies_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_again", die)
    wanted = run.Wanted(peers=(), backends=("reference",), passes=2, rounds=4)
    cases = [(find("forward"), TOY), (find("forward"), TOY.replace(variant="causal"))]
    end = time.monotonic() + 100
    found = list(passes.first(cases, wanted, end))
    assert list(passes.later(found, wanted, end)) == [0]
    assert found[0].sides[0].status.startswith("failed: BrokenProcessPool")
    assert not found[0].timed()
    assert found[1].timed()
