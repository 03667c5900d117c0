"""`make gpu` where there is no GPU: parts may hang or fail, and the table tells."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu import table  # noqa: E402
from benchmarks.gpu.__main__ import PARTS, Part, run  # noqa: E402
from benchmarks.gpu.guards import guarded  # noqa: E402
from benchmarks.gpu.watchdog import Outcome, supervise  # noqa: E402
from fused_attn import cuda_runtime  # noqa: E402


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
    assert run(Part("part", (sys.executable, "-c", code), limit), tmp_path, limit) == outcome


def test_a_missing_program_is_an_outcome(tmp_path: Path) -> None:
    assert run(Part("part", ("no-such-program",), 1), tmp_path, 1) == "no-such-program is not there"


def test_limits_fit_the_time_that_is_lent() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.limit <= 300 for part in PARTS)
    first = [part.name for part in PARTS][:3]
    assert first == ["build", "info", "parity-cuda"]


def test_the_table_shows_ratios_and_what_is_missing(tmp_path: Path) -> None:
    def write(name: str, row: dict[str, object]) -> None:
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)

    machine = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    write("ceilings", {"gemm_tflops": 800.0, "copy_gbs": 4000.0})
    write("attention", {
        "direction": "forward", "head_dim": 128, "causal": True, "length": 2048,
        "cuda": 300.0, "triton": "WRONG", "cudnn": 400.0, "flash": 200.0, "efficient": "no: why",
    })  # fmt: skip
    write("norms", {"direction": "forward", "width": 1024, "cuda": 3000.0, "torch": 1500.0})
    text = table.render(tmp_path, {"build": "ok", "sanitizer": "failed (1)"})
    for shown in ("0.75", "400 (cudnn)", "WRONG", "75%", "failed (1)"):
        assert shown in text


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
    assert counts.startswith("1 passed, 0 failed, 1 hung, 0 died, 0 not supported, 0 not begun")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu tells more")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "no GPU" in result.stdout
