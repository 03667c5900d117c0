"""What `setup.py` does where a build fails, with a CMake that is made up."""

from __future__ import annotations

import os
import re
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
  mkdir -p "$4/CMakeFiles" && echo why > "$4/CMakeFiles/CMakeConfigureLog.yaml"
  [ "$FAILS" = configure ] && exit $with_cuda
  [ "$FAILS" = broken ] && exit 1
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
    licences = ("LICENSE", "THIRD_PARTY.md")
    for name in ("setup.py", "pyproject.toml", "README.md", *licences, "fused_attn/_version.py"):
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


def build(
    checkout: Path, fails: str = "never", cuda: str | None = None, **more: str
) -> tuple[int, str, list[str]]:
    """Exit status, output and the calls of CMake."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ATTN")}
    environment |= {"FAILS": fails, "PATH": f"{checkout / 'bin'}:{environment['PATH']}", **more}
    if cuda is not None:
        environment["FUSED_ATTN_CUDA"] = cuda
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    log = checkout / "calls"
    calls = log.read_text().splitlines() if log.exists() else []
    return result.returncode, result.stdout + result.stderr, calls


def test_the_levels_are_those_of_the_machine_or_all(checkout: Path) -> None:
    for given, passed in (({}, "native"), ({"FUSED_ATTN_CPU_LEVELS": "all"}, "all")):
        assert build(checkout, **given)[0] == 0
        assert f"-DFUSED_ATTN_CPU_LEVELS={passed}" in (checkout / "calls").read_text()
        (checkout / "calls").unlink()
    status, output, calls = build(checkout, FUSED_ATTN_CPU_LEVELS="avx2")
    assert status != 0
    assert "FUSED_ATTN_CPU_LEVELS must be native or all, got 'avx2'" in output
    assert not calls


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


def test_what_cmake_speaks_of_outlives_the_clean_up(checkout: Path) -> None:
    """The advice comes last, and the log that CMake's messages name is still there."""
    status, output, _ = build(checkout, "broken", "off")
    assert status != 0
    [last] = output.strip().splitlines()[-1:]
    assert "Building fused_attn._C failed: CMake found a problem" in last
    assert "FUSED_ATTN_NATIVE=off" in last
    kept = re.search(r"its log is kept in (\S+\.log)", last)
    assert kept
    assert Path(kept[1]).read_text() == "why\n"
    assert not list((checkout / "build").glob("cmake-*/CMakeFiles"))  # the next try starts anew


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


GCC = "Copyright (C) Free Software Foundation, Inc."
COMPILERS = {
    "old gcc": (f"g++ (Ubuntu 9.4.0-1ubuntu1~20.04.2) 9.4.0\n{GCC}", "gcc 9.4", "gcc 11.0"),
    "old clang": ("Debian clang version 11.0.1-2", "clang 11.0", "clang 14.0"),
    "gcc": (f"g++ (Debian 12.2.0-14) 12.2.0\n{GCC}", "", ""),
    "clang": ("Ubuntu clang version 14.0.0-1ubuntu1.1", "", ""),
    "Apple's": ("Apple clang version 13.1.6 (clang-1316.0.21.2.5)", "", ""),
    "unknown": ("some compiler 3.2", "", ""),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_compiler_that_is_too_old_is_named_before_anything_is_compiled(
    checkout: Path, name: str
) -> None:
    said, found, needed = COMPILERS[name]
    compiler = script(checkout / "bin" / "a-compiler", f"cat <<'END'\n{said}\nEND")
    status, output, calls = build(checkout, cuda="off", CXX=compiler)
    if not found:
        assert status == 0, output
        return
    assert status != 0
    assert not calls
    assert f"is {found}, and fused_attn._C needs {needed} or later" in output
    assert "CXX=g++-12" in output
    assert "FUSED_ATTN_NATIVE=off" in output


def test_without_a_compiler_it_installs_and_says_how_to_get_one(checkout: Path) -> None:
    status, output, calls = build(checkout, CXX="no-such-compiler")
    assert status == 0, output
    assert not calls
    assert "No C++ compiler found (looked for no-such-compiler). To get one: " in output
    status, output, _ = build(checkout, CXX="no-such-compiler", FUSED_ATTN_NATIVE="on")
    assert status != 0
    assert "FUSED_ATTN_NATIVE=off" in output


# What stands where it is missing or other: a module that says so before setup.py runs.
FAKED = {
    "no pybind11": ("sys.modules['pybind11'] = None", "pybind11 was not found", "pip install"),
    "no cmake": ("import shutil; shutil.which = lambda n: n if n == 'c++' else None",
                 "CMake was not found", "--no-build-isolation"),
    "old setuptools": ("import setuptools; setuptools.__version__ = '68.1.2'",
                       "needs setuptools 77 or later, this is 68.1.2", "pip install"),
    "32 bits": ("sys.maxsize = 2**31 - 1", "needs a 64-bit Python", "new environment"),
    "PyPy": ("import platform; platform.python_implementation = lambda: 'PyPy'",
             "needs CPython, as torch does, and this is PyPy", "new environment"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAKED)
def test_what_is_missing_is_named_with_the_next_step(checkout: Path, name: str) -> None:
    fake, words, step = FAKED[name]
    (checkout / "faked.py").write_text(
        f"import runpy, sys\n{fake}\nsys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    command = [sys.executable, "faked.py"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert done.returncode != 0
    assert words in last
    assert step in last
