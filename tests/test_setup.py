"""What `setup.py` does where a build fails, with a CMake that is made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Configuring or building fails while CUDA is not off, as `FAILS` says; it writes down its calls.
CMAKE = """#!/bin/sh
echo "$@" >> "{log}"
with_cuda=1
if [ "$1" != --build ]; then
  mkdir -p "$4" && echo "$@" > "$4/configured"
  case "$*" in *-DFUSED_ATTN_CUDA=off*) with_cuda=0;; esac
  [ "$FAILS" = configure ] && exit $with_cuda
  exit 0
fi
case "$(cat "$2/configured")" in *-DFUSED_ATTN_CUDA=off*) with_cuda=0;; esac
[ "$FAILS" = always ] && exit 1
[ "$FAILS" = build ] && [ $with_cuda = 1 ] && exit 1
touch "$2/_C{suffix}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "fused_attn").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_attn/_version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "fused_attn/__init__.py").touch()
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    suffix = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    cmake.write_text(CMAKE.format(log=tmp_path / "calls", suffix=suffix))
    cmake.chmod(0o755)
    return tmp_path


def build(checkout: Path, fails: str, cuda: str | None) -> tuple[int, str, list[str]]:
    """Exit status, output and the calls of CMake."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ATTN")}
    environment |= {"FAILS": fails, "PATH": f"{checkout / 'bin'}:{environment['PATH']}"}
    if cuda is not None:
        environment["FUSED_ATTN_CUDA"] = cuda
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    calls = (checkout / "calls").read_text().splitlines()
    return result.returncode, result.stdout + result.stderr, calls


@pytest.mark.parametrize("fails", ["configure", "build"])
@pytest.mark.parametrize("cuda", [None, "auto"])
def test_cuda_that_fails_to_build_is_left_out(checkout: Path, fails: str, cuda: str | None) -> None:
    status, output, calls = build(checkout, fails, cuda)
    assert status == 0, output
    assert "Building again without the CUDA kernels" in output
    assert "-DFUSED_ATTN_CUDA=auto" in calls[0]
    assert "-DFUSED_ATTN_CUDA=off" in calls[-2]
    assert "the build with CUDA failed" in calls[-2]
    assert list((checkout / "fused_attn").glob("_C*.so"))


@pytest.mark.parametrize("fails", ["configure", "build"])
def test_cuda_that_was_asked_for_must_build(checkout: Path, fails: str) -> None:
    status, output, calls = build(checkout, fails, "on")
    assert status != 0
    assert "Building fused_attn._C failed" in output
    assert not any("-DFUSED_ATTN_CUDA=off" in call for call in calls)


def test_what_fails_without_cuda_too_fails(checkout: Path) -> None:
    status, output, _ = build(checkout, "always", None)
    assert status != 0
    assert "Building fused_attn._C failed" in output


def test_a_build_that_works_is_built_once(checkout: Path) -> None:
    status, output, calls = build(checkout, "never", None)
    assert status == 0, output
    assert len(calls) == 2
    assert "-DFUSED_ATTN_CUDA_FAILURE= " in calls[0] + " "
