"""The levels of 64-bit ARM, compiled by a cross compiler and run under qemu (`make aarch64`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.runtime import native

FOLDER = Path(__file__).parent / "aarch64"
NEEDED = ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "ninja")
MISSING = [program for program in NEEDED if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

ROOT = Path(__file__).parents[2]
FILES = [
    f"tests/ops/{op}/test_api.py"
    for op in ("attention", "layer_norm", "bias_activation", "embedding", "linear")
]
OLDEST, NEWEST = "cortex-a53", "max"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aarch64")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={FOLDER / 'toolchain.cmake'}"
    configure = ("cmake", "-S", FOLDER, "-B", folder, "-G", "Ninja", toolchain)
    subprocess.run((*configure, "-DCMAKE_BUILD_TYPE=Release"), check=True)
    return folder


def built(folder: Path, program: str) -> Path:
    subprocess.run(("cmake", "--build", folder, "--target", program), check=True)
    return folder / program


def run(processor: str, program: Path) -> subprocess.CompletedProcess[str]:
    command = ("qemu-aarch64", "-cpu", processor, program)
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("processor", [OLDEST, NEWEST])
def test_a_processor_gets_the_levels_that_it_can_run(programs: Path, processor: str) -> None:
    done = run(processor, built(programs, "levels"))
    assert done.stdout.split() == ["portable", "neon"]


@pytest.mark.parametrize("processor", [OLDEST, NEWEST])
def test_words_of_the_vectors_are_right(programs: Path, processor: str) -> None:
    done = run(processor, built(programs, "words_neon"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert " lanes checked, 0 wrong" in done.stdout


@pytest.mark.every
@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part to stand in for")
def test_kernels_pass_their_own_tests(programs: Path) -> None:
    """Minutes to compile. Only the plugin's count of calls says that they ran under qemu."""
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.cpu.aarch64.plugin")
    chosen = ("-k", "cpu and not compile", "--fuzz", "20", *FILES)
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", *plugins, *chosen),
        env={**os.environ, "FUSED_ATTN_AARCH64": str(built(programs, "kernels_neon"))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    calls = re.search(r"under qemu: (\d+) calls", done.stdout)
    assert calls is not None
    assert int(calls[1]) > 100
