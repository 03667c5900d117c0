"""The debug build of the CUDA kernels: a wait that has no end traps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNEL = """
#include "cuda/ptx.h"
__global__ void wait(unsigned barrier) { fused_attn::device::barrier_wait(barrier, 0); }
"""


def ptx(folder: Path, *flags: str) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    generator = CSRC / "cuda" / "generate_wgmma.py"
    subprocess.run([sys.executable, generator, folder / "wgmma_wrappers.h"], check=True)
    (folder / "wait.cu").write_text(KERNEL)
    command = [nvcc, "-std=c++17", "-arch=sm_90a", "-ptx", f"-I{CSRC}", f"-I{folder}", *flags]
    subprocess.run([*command, "-o", folder / "wait.ptx", folder / "wait.cu"], check=True)
    return (folder / "wait.ptx").read_text()


def test_a_debug_build_gives_up_after_a_second(tmp_path: Path) -> None:
    text = ptx(tmp_path, "-DFUSED_ATTN_TRAP")
    assert "mbarrier.try_wait" in text
    assert "globaltimer" in text
    assert "trap;" in text
    assert "1000000000" in text


def test_other_builds_lose_no_instruction_to_it(tmp_path: Path) -> None:
    text = ptx(tmp_path)
    assert "mbarrier.try_wait" in text
    assert "globaltimer" not in text
    assert "trap;" not in text
