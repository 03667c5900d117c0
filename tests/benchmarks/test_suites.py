"""The benchmark suites at toy sizes: who is timed, who is not and why, and what a run leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.suites import cli, memory, peers, results, run, timing
from benchmarks.suites.operations.attention import VARIANTS, Attention
from benchmarks.suites.suites import SUITES, find
from benchmarks.suites.timing import HostClock
from tests.cases.bench import TOY, bench, peer, quick  # noqa: F401

NAMES = [suite.name for suite in SUITES]


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_runs_and_records(name: str, tmp_path: Path) -> None:
    dtypes = ("--dtype", "fp32", *(["bf16"] if name in ("forward", "layer_norm") else []))
    assert bench(name, "--shapes", *find(name).toy, *dtypes, "--save", str(tmp_path)) == 0
    rows = results.read(tmp_path / f"{name}.csv")
    ours = [row for row in rows if row["ours"] == "yes"]
    assert any(results.counts(row) for row in ours)
    assert not [row for row in ours if row["status"].startswith(("wrong", "failed"))]
    for row in rows:
        assert row["machine"]
        assert row["commit"]
        assert row["date"]
        assert (row["median_s"] != "") == (row["status"] == "ok")
    peer_sides = {row["side"] for row in rows if row["ours"] == "no" and results.counts(row)}
    assert peer_sides or name == "import"


def explode(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand a long story")


def leave_a_row_out(out: torch.Tensor) -> torch.Tensor:
    """A kernel that forgets the last query of the last head."""
    result = torch.empty_like(out)
    result[:, :, :-1] = out[:, :, :-1]
    return result


@pytest.mark.parametrize(
    ("forward", "facts", "status"),
    [
        (None, {}, "ok"),
        (lambda out: out * 1.001, {}, "wrong: out: error"),
        (leave_a_row_out, {}, "wrong: out: error inf"),
        (explode, {}, "failed: RuntimeError: no such kernel"),
        (None, {"missing": lambda: "it is not installed"}, "absent: it is not installed"),
        (None, {"limits": lambda problem: ["a", "b"]}, "refused: a; b"),
    ],
    ids=["right", "wrong", "unwritten", "raises", "absent", "refuses"],
)
def test_only_what_is_right_gets_a_figure(
    forward: Callable[[], object] | None, facts: dict[str, object], status: str
) -> None:
    result = run.measure(find("forward"), TOY, [peer("it", forward, **facts)])
    [row] = [row for row in result.rows() if row["side"] == "it"]
    assert str(row["status"]).startswith(status)
    assert ("median_s" in row) == (status == "ok")


def test_a_wrong_gradient_gets_no_figure() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    problem = TOY.replace(direction="backward")
    result = run.measure(find("backward"), problem, [peer("it", Halved.apply), peer("right")])
    by_name = {side.name: side.status for side in result.sides}
    assert by_name["it"].startswith("wrong: gradient of q")
    assert by_name["right"] == "ok"


def test_wrong_attention_weights_get_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = find("weights").problems("cpu", [torch.float32], ["toy"])
    honest = type(problem).prepare

    def prepare(self, module, tensors):
        made = honest(self, module, tensors)

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            out, weights = made.forward()
            return out, weights * 1.001

        return dataclasses.replace(made, forward=forward)

    monkeypatch.setattr(type(problem), "prepare", prepare)
    result = run.measure(find("weights"), problem, ())
    assert [side.status.partition(": error")[0] for side in result.sides] == ["wrong: weights"]


def test_a_wrong_kernel_of_ours_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Attention.prepare

    def prepare(self, backend, tensors):
        prepared = honest(self, backend, tensors)
        return dataclasses.replace(prepared, forward=lambda: prepared.forward() + 1e-3)

    monkeypatch.setattr(Attention, "prepare", prepare)
    wanted = run.Wanted(peers=(), backends=("reference",))
    result = run.measure(find("forward"), TOY, peers.PEERS, wanted)
    [side] = result.sides
    assert side.verdict == "wrong"
    assert not any(result.times.values())


def test_a_slower_kernel_is_a_regression(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["forward", "--shapes", "toy,full", "--dtype", "fp32", "--peers", "none"]
    command += ["--backends", "reference", "--device", "cpu", "--rounds", "5"]
    command += ["--passes", "1"]  # a later one would be in a process without what comes
    before, after = tmp_path / "before", tmp_path / "after"
    assert cli.main([*command, "--save", str(before)]) == 0
    honest = Attention.prepare

    def prepare(self, backend, tensors):
        prepared = honest(self, backend, tensors)

        def twenty_times() -> object:
            return [prepared.forward() for _ in range(20)][-1]

        return dataclasses.replace(prepared, forward=twenty_times)

    monkeypatch.setattr(Attention, "prepare", prepare)
    assert cli.main([*command, "--save", str(after)]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(before), str(after)]) == 1
    text = capsys.readouterr().out
    assert "REGRESSIONS" in text
    assert "fused_attn:reference" in text
    assert cli.main(["compare", str(after), str(before)]) == 0
    assert cli.main(["compare", str(before), str(before)]) == 0


def test_a_case_that_cannot_be_set_up_is_recorded_as_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def tensors(self):
        raise MemoryError("no room for q")

    monkeypatch.setattr(Attention, "tensors", tensors)
    assert bench("forward", "--shapes", "toy,full", "--dtype", "fp32", "--save", str(tmp_path)) == 1
    assert "no room for q" in capsys.readouterr().out
    [row] = results.read(tmp_path)
    assert row["status"] == "failed: the case itself: MemoryError: no room for q"


def test_who_is_absent_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gone = peer("gone", missing=lambda: "gone-kernels is not installed")
    monkeypatch.setattr(peers, "PEERS", (gone,))
    assert (
        bench("forward", "--shapes", "toy,full", "--dtype", "fp32", "--backends", "reference") == 0
    )
    text = capsys.readouterr().out
    assert "gone-kernels is not installed" in text


def test_a_case_measured_again_replaces_its_rows_alone(tmp_path: Path) -> None:
    command = ["--dtype", "fp32", "--peers", "none", "--backends", "reference"]
    command += ["--save", str(tmp_path)]
    bench("forward", "--shapes", "toy", *command)
    first = results.read(tmp_path)
    bench("forward", "--shapes", "toy,full", *command)
    again = results.read(tmp_path)
    assert len(again) == len(first) == 2
    assert {row["variant"] for row in again} == {"full", "causal"}


def test_a_budget_that_is_over_says_what_is_left(capsys: pytest.CaptureFixture) -> None:
    bench("forward", "--shapes", "toy", "--budget", "0", "--peers", "none")
    assert "not measured, 0 s are over: 4 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["flying"], "forward"),
        (["forward", "--peers", "nobody"], "sdpa-flash"),
        (["forward", "--backends", "vulkan"], "reference"),
        (["forward", "--dtype", "int8"], "bf16"),
        (["forward", "--device", "tpu"], "cpu or cuda"),
        (["forward", "--shapes", "1,2,three,4,5,6"], "B,H,Hkv,Lq,Lk,D"),
        (["forward", "--shapes", "1,2,2,8,8"], "tokens-16k"),
        (["forward", "--shapes", "1,3,2,8,8,8"], "H must be a multiple of Hkv"),
        (["forward", "--shapes", "toy,diagonal"], "causal"),
        (["modules", "--shapes", "1,8,30,4"], "WIDTH must be a multiple of HEADS"),
        (["forward", "--rounds", "0"], "a number from 2"),
        (["compare", "nowhere", "nowhere"], "there is nothing at nowhere"),
        (["report", "nowhere"], "there is nothing at nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_lists_the_choices(
    arguments: list[str], choices: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(cli.main(arguments))
    assert stopped.value.code == 2
    assert choices in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["forward", "--device", "cuda"])
    assert "devices: cpu" in capsys.readouterr().err


def test_attention_knows_every_variant() -> None:
    for variant in VARIANTS:
        problem = TOY.replace(variant=variant)
        assert 0 < problem.visible() <= 1.0
        assert problem.flops > 0
    window = TOY.replace(variant="window", seqlen_q=100, seqlen_k=100)
    seen = sum(min(i, 25) + 1 for i in range(100))
    assert window.visible() == pytest.approx(seen / 100**2)


@pytest.mark.skipif(memory.why_not("cpu") is not None, reason=str(memory.why_not("cpu")))
def test_peak_memory_counts_what_a_call_touches() -> None:
    def call() -> torch.Tensor:
        scratch = torch.ones(64 * 2**20, dtype=torch.uint8)
        return scratch[:1].clone()

    assert 62 * 2**20 < memory.peak_bytes(call, "cpu") < 72 * 2**20


def test_a_side_that_fails_while_it_is_timed_is_out() -> None:
    times, failed = HostClock(1, 2).time({"good": lambda: None, "bad": lambda: 1 / 0})
    assert set(times) == {"good"}
    assert isinstance(failed["bad"], ZeroDivisionError)


def test_a_side_that_fails_by_one_clock_has_no_figure_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unlucky(HostClock):
        def time(self, sides):
            return {}, {"it": RuntimeError("out of luck")}

    both = [HostClock(1, 2), Unlucky(2, 2)]
    monkeypatch.setattr(run, "clocks", lambda suite, problem, wanted: both)
    result = run.measure(find("forward"), TOY, [peer("it")])
    [row] = [row for row in result.rows() if row["side"] == "it"]
    assert row["status"] == "failed: RuntimeError: out of luck"
    assert "median_s" not in row


class PretendedEvent:
    """A device event that knows the host's time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: PretendedEvent) -> float:
        return (end.at - self.at) * 1e3


def test_device_clocks_on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here: that samples are taken in turn, flushed before, read at the end."""
    calls: list[str] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    here = {
        "Event": PretendedEvent, "synchronize": lambda: None, "CUDAGraph": Graph,
        "Stream": Stream, "current_stream": Stream, "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
    }  # fmt: skip
    for name, stand_in in here.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: Flushed(calls))
    sides = {name: functools.partial(calls.append, name) for name in "ab"}
    times, failed = timing.DeviceClock(2).time(sides)
    assert not failed
    assert all(t.samples == 2 and 0 < t.median < 1 for t in times.values())
    assert calls == ["a"] * 3 + ["b"] * 3 + ["flush", "a", "flush", "b"] * 2
    calls.clear()
    times, failed = timing.GraphClock(2).time({"a": sides["a"], "bad": lambda: 1 / 0})
    assert list(times) == ["a"]
    assert list(failed) == ["bad"]
    assert calls == ["a"] * 4 + (["flush"] + ["replay"] * 20) * 2
    calls.clear()
    assert timing.LaunchClock(2).time(sides)[0].keys() == {"a", "b"}
    assert len(calls) == 2 * (3 + 2 * 200)


class Flushed:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def zero_(self) -> None:
        self.calls.append("flush")
