"""Host times of Triton's calls over a stand-in for libcuda."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import fake_gpu, host_time

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from benchmarks import host_time
host_time.ROUNDS, host_time.CALLS = 2, 20
sys.exit(host_time.main(["--only", "bias_activation"]))
"""


@pytest.mark.skipif(
    fake_gpu.why_not_installed() is not None, reason=str(fake_gpu.why_not_installed())
)
def test_both_ways_are_timed_side_by_side() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    [row] = [dict(part.split("=") for part in line.split()) for line in done.stdout.splitlines()]
    assert row["call"] == "bias_activation"
    assert row["launches"] == "1"
    # A repeated call that went through Triton's binder would take as long as the other.
    assert 0 < float(row["repeated_us"]) < float(row["as_ever_us"]) / 1.5
    assert float(row["torch_tiny_cpu_us"]) > 0


def test_the_interpreter_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="nothing is launched"):
        host_time.main([])
