"""The CPU kernels at every instruction-set level that this machine has, forced one by one.

The level is chosen when the compiled part is loaded, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.runtime import native

ROOT = Path(__file__).parents[2]
OPS = ROOT / "tests" / "ops"
FILES = (
    "attention/test_api.py",
    "attention/test_extreme_scores.py",
    "attention/test_semantics.py",
    "bias_activation/test_api.py",
    "embedding/test_api.py",
    "layer_norm/test_api.py",
    "layer_norm/test_extreme_rows.py",
    "linear/test_epilogue.py",
)


INTRINSICS = re.compile(r"\b_mm\d*_|immintrin|arm_neon|\bv[a-z0-9]+q?_(n_)?[fsu](16|32|64)\b")


def levels_below_the_best() -> list[str]:
    if native.why_not() is not None:
        return []
    available = native.module().available_cpu_levels()
    return [level for level in available if level != native.module().cpu_level()]


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "FUSED_ATTN_CPU": level},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("level", levels_below_the_best())
def test_level_passes_the_suite(level: str) -> None:
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    files = [str(OPS / file) for file in FILES]
    done = run(level, *arguments, "--fuzz", "40", "-k", "cpu", *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("level", levels_below_the_best())
def test_level_is_the_one_that_was_forced(level: str) -> None:
    code = "from fused_attn.runtime import native; print(native.module().cpu_level())"
    assert run(level, "-c", code).stdout.strip() == level


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_an_unknown_level_is_an_error_that_lists_the_known_ones() -> None:
    code = "from fused_attn.runtime import native; native.module().cpu_level()"
    done = run("mmx", "-c", code)
    assert done.returncode != 0
    assert "FUSED_ATTN_CPU" in done.stderr
    assert "portable" in done.stderr


def test_intrinsics_stand_in_the_vector_headers_only() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp")]
    holders = {path.name for path in sources if INTRINSICS.search(path.read_text())}
    assert holders == {"vec_avx2.h", "vec_avx512.h", "vec_neon.h", "tiles_amx.h"}


def test_levels_are_asked_for_what_they_can_do() -> None:
    """Nothing in the kernels compares a level with another: levels.h says what each has."""
    named = re.compile(r"\b(avx2|avx512|avx512_bf16|avx512_amx|neon|portable)\b")
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cpp"):
            code = re.sub(r"//.*|\"[^\"\n]*\"", "", path.read_text())
            assert not named.search(code) or path.name in ("levels.h", "level.cpp"), path


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86")
@pytest.mark.skipif(native.why_not() is not None, reason="installed without the compiled part")
def test_a_build_for_this_machine_would_have_its_levels(tmp_path: Path) -> None:
    """What CMake asks for FUSED_ATTN_CPU_LEVELS=native, against what the module finds."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++")
    program = tmp_path / "levels_here"
    source = ROOT / "csrc/cpu/levels_here.cpp"
    subprocess.run([compiler, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    count = subprocess.run([program], check=False).returncode
    module = native.module()
    if module.cpu_level_left_out():
        assert count > len(module.available_cpu_levels())
    else:
        assert count == len(module.available_cpu_levels())


def test_an_unknown_level_and_one_that_is_not_there_are_refused() -> None:
    if native.why_not() is not None:
        pytest.skip("installed without the compiled part")
    command = [sys.executable, "-m", "fused_attn", "info"]
    for name, words in (("avx", "must be one of portable"), ("avx512_bf16", "lacks that level")):
        if name in native.module().available_cpu_levels() or platform.machine() != "x86_64":
            continue
        done = subprocess.run(
            command, env={**os.environ, "FUSED_ATTN_CPU": name}, capture_output=True, text=True
        )
        assert words in done.stdout + done.stderr
