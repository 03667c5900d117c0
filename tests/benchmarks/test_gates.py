"""The CPU gates: a table over the suites' cases, which row counts where, and what fails."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cpu_gates
from benchmarks.gates import GATES, LEVELS, Gate, chosen, parse
from benchmarks.suites import machine
from benchmarks.suites.operations.attention import Attention
from benchmarks.suites.suites import find
from fused_attn.runtime import native
from tests.cases.bench import peer, quick  # noqa: F401

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "amd-epyc-family-26"
TOY = Gate(find("forward"), "forward", "2,2,2,12,12,8", "full", "fp32", "avx2", 1.2, 1.5, 0.0)

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def recorded(name: str) -> list[dict[str, str]]:
    with (RECORDED / name).open(newline="") as file:
        return list(csv.DictReader(file))


def first_classes(level: str) -> list[Gate]:
    """Those of the first record: linears came after it."""
    return [gate for gate in chosen(level, GATES) if gate.suite.name != "linear"]


@pytest.mark.parametrize("level", ["avx512", "avx512_bf16"])
def test_with_avx512_all_classes_and_gates_are_those_of_the_first_record(level: str) -> None:
    rows = recorded("cpu_gates.csv")
    assert len(rows) == 115
    found = [(g.name, g.gate, g.goal, g.share) for g in first_classes(level)]
    assert found == [
        (r["class"], float(r["gate"]), float(r["goal"]), float(r["share_gate"])) for r in rows
    ]


def test_cases_count_the_work_that_was_recorded() -> None:
    """The same problems as ever: FLOPs and bytes are those that the recorded rates came from."""
    counted = 0
    for gate, row in zip(first_classes("avx512"), recorded("cpu_gates.csv"), strict=True):
        problem, seconds = gate.problem, float(row["ours_ms"]) / 1e3
        for rate, work in (("gflops", problem.flops), ("gbytes", problem.bytes)):
            if float(row[rate]):
                assert work / seconds / 1e9 == pytest.approx(float(row[rate]), rel=0.02), gate.name
                counted += 1
    assert counted == 73


def test_a_class_has_one_row_a_level() -> None:
    rows = [(gate.name, gate.level) for gate in GATES]
    assert len(set(rows)) == len(rows)
    assert {level for _, level in rows} <= set(LEVELS)
    cases: dict[str, set[str]] = {}
    for gate in GATES:
        cases.setdefault(gate.name, set()).add(gate.problem.label)
    assert all(len(labels) == 1 for labels in cases.values()), "a name is one case"


AVX2 = {
    "fp32 fwd 1x8x2048x64": (1.2, 1.35, 0.8),
    "fp32 fwd 2x8x512x128": (1.15, 1.3, 0.8),
    "fp32 fwd 1x8x2048x64 causal": (1.55, 1.8, 0.0),
    "fp32 fwd 32x8x100x64 causal": (2.2, 2.8, 0.0),
    "fp32 fwd 2x8x512x64 bias": (1.15, 1.3, 0.0),
    "fp32 fwd 8x8x512x64 padding": (1.6, 1.9, 0.0),
    "bf16 fwd 2x8x512x64 causal": (2.4, 3.0, 0.0),
    "bf16 fwd+bwd 8x12x128x64": (2.0, 2.6, 0.0),
    "fp16 fwd+bwd 8x12x128x64": (2.0, 2.6, 0.0),
    "fp32 fwd+bwd 1x8x2048x128": (1.2, 1.35, 0.8),
    "bf16 fwd 8x32x4096x128 decode": (5.0, 8.0, 0.0),
    # Nothing is set for these without AVX-512: torch's speed is asked for.
    "bf16 fwd 1x8x2048x64 causal": (1.0, 1.0, 0.0),
    "fp32 packed 8x8x512x64": (1.0, 1.0, 0.0),
    "fp32 tiny call": (2 / 3, 1.0, 0.0),
}


@pytest.mark.parametrize("name", AVX2)
def test_without_avx512_its_own_gates_count(name: str) -> None:
    rows = chosen("avx2", GATES)
    assert len(rows) == 135
    [gate] = [gate for gate in rows if gate.name == name]
    assert (gate.gate, gate.goal, gate.share) == pytest.approx(AVX2[name])
    assert gate.level == "avx2"


def test_the_row_of_the_level_comes_first_then_the_next_lower() -> None:
    def row(level: str, gate: float) -> Gate:
        return dataclasses.replace(TOY, level=level, gate=gate, goal=gate, share=0.5)

    rows = [row("avx512", 4.0), row("avx2", 2.0), row("avx512_bf16", 8.0)]
    for level, gate in (("avx2", 2.0), ("avx512", 4.0), ("avx512_bf16", 8.0)):
        assert [g.gate for g in chosen(level, rows)] == [gate]
        assert [g.gate for g in chosen(level, rows[::-1])] == [gate]
    assert [g.gate for g in chosen("avx512_bf16", rows[:2])] == [4.0]
    for level in ("portable", "none", "a level of tomorrow"):
        [least] = chosen(level, rows)
        assert (least.gate, least.goal, least.share) == (1.0, 1.0, 0.0)


def test_a_table_is_read_as_it_is_written() -> None:
    [gate, packed] = parse("""
suite   dir.     shape            variant dtype level gate goal share facts
forward training 1,4,2,8,16,64    causal  bf16  avx2  2/3  1.5  -

packed  forward  8,8,8,512,64     full    fp32  avx2  1.5  2    0.80  2/3
""")
    assert (gate.gate, gate.goal, gate.share) == (2 / 3, 1.5, 0.0)
    assert gate.name == "bf16 fwd+bwd 1x4x16x64 causal Lq=8 grouped 4/2"
    assert gate.problem.label == "bf16 training 1x4/2x8:16x64 causal"
    assert packed.problem.mean_length == 2 / 3
    assert packed.share == 0.8


@pytest.mark.parametrize(
    ("seconds", "share", "verdict"),
    [
        (0.5, 0.0, "goal"),
        (0.8, 0.0, "ok"),
        (0.9, 0.0, "BELOW GATE"),
        (0.5, 0.9, "BELOW 90% OF THE PEAK"),
        (0.5, 0.7, "goal"),
    ],
)
def test_ratio_and_share_decide(
    seconds: float, share: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = dataclasses.replace(TOY, share=share)
    at_80_percent = gate.problem.flops / 0.5 / 0.8
    monkeypatch.setattr(cpu_gates, "peak_flops", lambda dtype: at_80_percent)
    found = cpu_gates.judged(gate, 1, seconds, 1.0)
    assert found["verdict"] == verdict
    assert found["ratio"] == round(1 / seconds, 3)


@needs_kernels
def test_a_gate_is_measured_by_the_sides_of_its_suite() -> None:
    row = cpu_gates.measure(dataclasses.replace(TOY, gate=0.0, goal=0.0), 1)
    assert row["verdict"] == "goal"
    assert row["class"] == "fp32 fwd 2x2x12x8"
    assert row["peer"] in ("sdpa-flash", "sdpa-math")
    assert row["ours_ms"] > 0


@needs_kernels
def test_what_is_wrong_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    honest = Attention.prepare

    def prepare(self, backend, tensors):
        made = honest(self, backend, tensors)
        return dataclasses.replace(made, forward=lambda: made.forward() + 1e-3)

    monkeypatch.setattr(Attention, "prepare", prepare)
    assert str(cpu_gates.measure(TOY, 1)["verdict"]).startswith("WRONG: OUT")
    monkeypatch.setattr(cpu_gates, "GATES", [TOY])
    assert cpu_gates.main([]) == 1
    assert "0 classes hold, 1 do not" in capsys.readouterr().out


@needs_kernels
def test_a_peer_that_is_wrong_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = peer("sdpa-math", lambda out: out * 1.01)
    monkeypatch.setattr(cpu_gates, "PEERS", (wrong,))
    assert cpu_gates.measure(TOY, 1)["verdict"] == "NO PEER"


@needs_kernels
def test_the_whole_table_is_recorded_or_one_class_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    both = [dataclasses.replace(TOY, gate=0.0, shape=f"2,2,2,{n},{n},8") for n in (12, 16)]
    monkeypatch.setattr(cpu_gates, "GATES", both)
    monkeypatch.setattr(cpu_gates, "RESULTS", tmp_path)
    path = tmp_path / machine.folder_name() / "cpu_gates.csv"
    path.parent.mkdir()
    path.write_text("class,ratio\na class that is no more,1.0\n")
    assert cpu_gates.main(["--save"]) == 0
    with path.open(newline="") as file:
        first = {row["class"]: row for row in csv.DictReader(file)}
    assert list(first) == ["fp32 fwd 2x2x12x8", "fp32 fwd 2x2x16x8"]
    assert set(recorded("cpu_gates.csv")[0]) == set(first["fp32 fwd 2x2x12x8"])
    assert cpu_gates.main(["--save", "--only", "x16x"]) == 0
    with path.open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(first)
    assert "1 classes hold, 0 do not" in capsys.readouterr().out


def test_avx2_is_forced_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(command: list[str], env: dict[str, str], **options: object):
        assert command[1:] == ["-m", "benchmarks.cpu_gates", "--avx2", "--only", "tiny"]
        assert env["FUSED_ATTN_CPU"] == env["ATEN_CPU_CAPABILITY"] == "avx2"
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.delenv("FUSED_ATTN_CPU", raising=False)
    monkeypatch.setattr(cpu_gates.subprocess, "run", pretend)
    assert cpu_gates.main(["--avx2", "--only", "tiny"]) == 7


@pytest.mark.parametrize("how", [["benchmarks/cpu_gates.py"], ["-m", "benchmarks.cpu_gates"]])
def test_it_runs_as_a_script_and_as_a_module(how: list[str], tmp_path: Path) -> None:
    script = how[0].endswith(".py")
    command = [sys.executable, str(ROOT / how[0])] if script else [sys.executable, *how]
    done = subprocess.run(
        [*command, "--only", "no such class"], cwd=tmp_path if script else ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "bf16 encoder infer d768 L512 padding" in done.stderr


def test_a_checkout_that_is_not_built_does_not_hide_what_is_installed(tmp_path: Path) -> None:
    clone, installed = tmp_path / "clone", tmp_path / "installed"
    (clone / "benchmarks").mkdir(parents=True)
    (clone / "benchmarks" / "__init__.py").write_text(
        (ROOT / "benchmarks" / "__init__.py").read_text()
    )
    for folder in (clone, installed):
        (folder / "fused_attn").mkdir(parents=True)
        (folder / "fused_attn" / "__init__.py").touch()
    (installed / "fused_attn" / "_C.so").touch()
    code = "import benchmarks, fused_attn; print(fused_attn.__file__)"

    def imported() -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        return done.stdout

    assert str(installed) in imported()
    (clone / "fused_attn" / "_C.so").touch()
    assert str(clone) in imported()
