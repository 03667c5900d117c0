"""The pytest plugin, in a project of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.runtime import native

ROOT = Path(__file__).parents[2]
PROJECT = """
import torch
import fused_attn
from fused_attn.testing import assert_matches_reference

def test_my_call(fused_attn_backend, fused_attn_level):
    assert isinstance(fused_attn_level, str)
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    assert_matches_reference(fused_attn.attention, q, q, q, causal=True)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(PROJECT)
    command = [sys.executable, "-m", "pytest", "-p", "fused_attn.testing.plugin", "-v", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_fixtures_and_random_calls(tmp_path: Path) -> None:
    done = run(tmp_path, "--fused-attn-fuzz", "3", "--fused-attn-seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_my_call[cpu] PASSED" in done.stdout
    for op in ("attention cpu", "linear reference", "modules fused"):
        assert f"fused_attn fuzz {op} PASSED" in done.stdout


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_the_example_runs(tmp_path: Path) -> None:
    for path in (ROOT / "examples" / "own_ci").glob("*.py"):
        shutil.copy2(path, tmp_path)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_model.py::test_the_swapped_model_is_the_model PASSED" in done.stdout
    assert "test_the_attention_that_we_call[cpu] PASSED" in done.stdout


def test_a_number_that_is_none(tmp_path: Path) -> None:
    done = run(tmp_path, "--fused-attn-fuzz", "-3")
    assert done.returncode != 0
    assert "--fused-attn-fuzz must be at least 0, got -3" in done.stdout + done.stderr
