"""`make gpu` where there is no GPU: parts may hang or fail, and the table tells."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import measure, table
from benchmarks.gpu.guards import guarded
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.stage import run
from benchmarks.gpu.watchdog import Outcome, supervise
from benchmarks.suites import cli, results
from benchmarks.suites.suites import find
from fused_attn.runtime import cuda as cuda_runtime

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('fine')", "ok"),
        ("raise SystemExit(3)", "failed (3)"),
        ("import time; time.sleep(60)", "took longer than 1 s"),
    ],
)
def test_a_part_ends_one_way_or_another(tmp_path: Path, code: str, outcome: str) -> None:
    limit = 1 if "sleep" in code else 30
    part = Part("part", (1,), limit, (sys.executable, "-c", code))
    assert run(part, tmp_path, limit)[0] == outcome


def test_a_missing_program_is_an_outcome(tmp_path: Path) -> None:
    part = Part("part", (1,), 1, ("no-such-program",))
    assert run(part, tmp_path, 1)[0] == "no-such-program is not there"


@pytest.mark.parametrize(
    "module",
    ["benchmarks.gpu", "benchmarks.gpu.parity", "benchmarks.gpu.compile",
     "benchmarks.compiler.ptxas", "benchmarks.compiler.triton_report", "benchmarks.cpu_gates"],
)  # fmt: skip
def test_tools_say_how_they_are_called(module: str) -> None:
    if module.endswith(("triton_report", "gpu.compile")):
        pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_table_shows_ratios_and_what_is_missing_on_one_screen(tmp_path: Path) -> None:
    def row(side: str, dim: int, causal: bool, speed: float, **facts: str) -> dict[str, str]:
        variant = "causal" if causal else "full"
        made = dict.fromkeys(results.COLUMNS, "") | {
            "suite": "forward", "case": f"bf16 forward 2x16x8192x{dim} {variant}",
            "direction": "forward", "dtype": "bf16", "device": "cuda", "batch": "2",
            "heads": "16", "heads_kv": "16", "seqlen_q": "8192", "seqlen_k": "8192",
            "head_dim": str(dim), "variant": variant, "side": side, "status": "ok",
            "ours": "yes" if side.startswith("fused_attn") else "no", "clock": "device events",
            "min_s": "1", "median_s": f"{1e6 / speed}", "gflops": f"{speed}", "share": "0.75",
        }  # fmt: skip
        return made | facts

    rows = []
    for dim in (64, 128, 256):
        for causal in (False, True):
            rows += [
                row("fused_attn:cuda", dim, causal, 300e3),
                row("fused_attn:triton", dim, causal, 0.1, status="wrong: out", clock="",
                    median_s="", gflops=""),
                row("sdpa-cudnn", dim, causal, 400e3), row("sdpa-flash", dim, causal, 200e3),
                row("flex", dim, causal, 123e3),
            ]  # fmt: skip
    results._write(tmp_path / "forward.csv", rows)
    for name in ("masks", "packed", "decode", "layer_norm", "modules", "weights", "overhead"):
        others = [
            {**r, "suite": name, "direction": d} for r in rows for d in ("forward", "training")
        ]
        results._write(tmp_path / f"{name}.csv", others)
    slower = [
        row("fused_attn:cuda", dim, False, 270e3, suite="backward", direction="backward")
        for dim in (64, 128)
    ]
    results._write(
        tmp_path / "backward.csv",
        [{**r, "gflops": "300000", "median_s": f"{1e6 / 300e3}"} for r in slower],
    )
    (tmp_path / "deterministic").mkdir()
    results._write(tmp_path / "deterministic" / "backward.csv", slower)
    machine = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    (tmp_path / "ceilings.json").write_text(json.dumps({"gemm_tflops": 800.0, "copy_gbs": 4000.0}))
    names = [part.name for part in PARTS if 3 in part.stages]
    outcomes = dict.fromkeys(names, "ok") | {"memcheck": "failed (1)"}
    text = table.render(tmp_path, outcomes)
    for shown in ("0.75", "400 (sdpa-cudnn)", "WRONG", "failed (1)", "gemm_tflops 800.0", "more",
                  "0.90 0.90 0.90", " flex", " 123 "):  # fmt: skip
        assert shown in text
    assert len(text.splitlines()) <= 50
    assert all(len(line) <= 100 for line in text.splitlines())


def test_every_measurement_is_a_known_suite_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command lines are read on this machine; only what they measure needs a GPU."""
    asked: list[str] = []

    def read(arguments: list[str]) -> int:
        at = arguments.index("--device")
        options = cli._parse([*arguments[:at], *arguments[at + 2 :], "--device", "cpu"])
        assert options.backends == ("cuda", "triton"), "torch's own serve by default: name ours"
        for name in options.suites:
            asked.append(name)
            assert find(name).problems("cuda", options.dtype, options.shapes)
        return 0

    monkeypatch.setenv("FUSED_ATTN_RESULTS", "nowhere")
    monkeypatch.setattr(measure.cli, "main", read)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    seconds: list[int] = []
    real = measure.suite
    monkeypatch.setattr(
        measure, "suite", lambda name, limit, *rest, **how: (
            seconds.append(limit), real(name, limit, *rest, **how)),
    )  # fmt: skip
    for part in PARTS:
        if callable(part.work) and part.work.__module__ == measure.__name__:
            if part.work in (measure.ceilings, measure.tuning):
                continue
            assert dict(part.environment)["FUSED_ATTN_BACKENDS"] == "cuda,triton", part.name
            del seconds[:]
            part.work()
            assert sum(seconds) < part.limit, f"{part.name}: its suites take longer than it may"
            if part.name == "deterministic":
                assert not torch.utils.deterministic.fill_uninitialized_memory
    assert {"forward", "backward", "masks", "packed", "decode", "modules", "weights"} <= set(asked)


WORKER = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu.watchdog import work

def check(name):
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        raise SystemExit(9)
    print("chatter")
    return ("failed", "why") if name == "fails" else ("passed", "")

work(sys.stdin, check)
"""


def test_a_check_that_hangs_or_dies_is_named_and_the_rest_goes_on() -> None:
    command = (sys.executable, "-c", WORKER.format(root=str(ROOT)))
    names = ("a", "hangs", "b", "dies", "fails", "c")
    assert list(supervise(names, command, limit=5, budget=60)) == [
        Outcome("a", "passed"),
        Outcome("hangs", "hung", "killed after 5 s"),
        Outcome("b", "passed"),
        Outcome("dies", "died", "exit code 9"),
        Outcome("fails", "failed", "why"),
        Outcome("c", "passed"),
    ]
    assert list(supervise(names, command, limit=5, budget=0)) == []
    broken = (sys.executable, "-c", "raise SystemExit(4)")
    assert [x.kind for x in supervise(("a", "b"), broken, limit=5, budget=60)] == ["died", "died"]


def test_after_two_deaths_the_family_is_left_out_and_others_go_on() -> None:
    command = (sys.executable, "-c", WORKER.format(root=str(ROOT)))
    names = ("dies", "dies", "a", "b")
    found = list(supervise(names, command, 5, 60, family=lambda name: "b" if name == "b" else "x"))
    assert [(x.name, x.kind) for x in found] == [
        ("dies", "died"), ("dies", "died"), ("a", "left out"), ("b", "passed"),
    ]  # fmt: skip
    assert found[2].text == "2 of x hung or died"


def test_several_workers_share_the_checks() -> None:
    command = (sys.executable, "-c", WORKER.format(root=str(ROOT)))
    names = ("hangs", *"abcdefgh")
    start = time.monotonic()
    found = list(supervise(names, command, limit=4, budget=60, workers=2))
    assert {x.name: x.kind for x in found} == dict.fromkeys("abcdefgh", "passed") | {
        "hangs": "hung"
    }
    assert found[-1].name == "hangs", "the other worker did not wait"
    assert time.monotonic() - start < 30


def test_guards_tell_who_wrote_past_the_end_and_what_was_not_written() -> None:
    def write(how: str) -> None:
        with guarded() as guards:
            given = guards.fenced(torch.arange(12.0).view(3, 4).t(), "given")
            assert given.stride() == (1, 4)
            assert torch.equal(given, torch.arange(12.0).view(3, 4).t())
            made = torch.empty_like(given)
            assert made.isnan().all()
            made.fill_(1.0)
            if how != "right":
                tensor = given if "given" in how else made
                offset = tensor.storage_offset() + (12 if "after" in how else -1)
                tensor.as_strided((1,), (1,), offset).fill_(0.0)

    write("right")
    for how, name in (
        ("after given", "given"), ("before given", "given"), ("after", "a result of shape"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=f"written outside of {name}"):
            write(how)


@pytest.mark.skipif(not cuda_runtime.emulated(), reason="needs the emulator")
def test_parity_goes_on_after_a_hang() -> None:
    command = (
        *(sys.executable, "-m", "benchmarks.gpu.parity", "cuda", "--device", "cpu"),
        *("--dtypes", "fp16", "--modes", "default", "--match", "one key", "--case-limit", "8"),
        *("--inject", "hang", "one key"),
    )
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    wrong, counts = result.stdout.splitlines()
    assert wrong == "HUNG cuda | one key | fp16 | default: killed after 8 s"
    assert counts.startswith(
        "1 passed, 0 failed, 1 hung, 0 died, 0 not supported, 0 left out, 0 not"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu tells more")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "no GPU" in result.stdout
