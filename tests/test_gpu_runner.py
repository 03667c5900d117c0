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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu tells more")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "no GPU" in result.stdout
