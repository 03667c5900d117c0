"""What is published: the sdist holds what a wheel is built from, and the wheel all that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Without the compiled part, which takes minutes; tests/test_setup.py is about how it is built.
QUICK = {**os.environ, "FUSED_ATTN_NATIVE": "off", "PYTEST_ADDOPTS": ""}


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**QUICK, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of what git knows, made in a copy: nothing else may be needed."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    copy.mkdir()
    listed = run("git", "ls-files", "-z", cwd=ROOT) if (ROOT / ".git").exists() else ""
    if not listed:
        pytest.skip("no checkout of git")
    for name in listed.split("\0"):
        if name and not name.startswith("benchmarks/results/"):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_sdist('out')"
    run(sys.executable, "-c", build, cwd=copy)
    [archive] = (copy / "out").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    [unpacked] = folder.glob("fused_attn-*")
    return unpacked


def test_the_sdist_holds_all_that_is_built_and_tested(source: Path) -> None:
    for name in ("CMakeLists.txt", "csrc", "tests", "benchmarks", "Makefile", "constraints.txt"):
        assert (source / name).exists(), name
    sources = {p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {path for path in sources if not (source / path).exists()} == set()


def test_a_wheel_of_the_sdist_runs_and_passes_tests(source: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        files.extractall(tmp_path / "site")
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fused_attn"}
    licences = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "THIRD_PARTY.md"}
    kinds = {name.rpartition(".")[2] for name in names if name.startswith("fused_attn/")}
    assert kinds <= {"py", "typed", "json", "md", "so", "pyd"}
    [metadata] = (tmp_path / "site").glob("*.dist-info/METADATA")
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata.read_text()
    site = {"PYTHONPATH": str(tmp_path / "site")}
    where = "import fused_attn; print(fused_attn.__file__)"
    assert str(tmp_path) in run(sys.executable, "-c", where, cwd=tmp_path, **site)
    said = run(sys.executable, "-m", "fused_attn", "--version", cwd=tmp_path, **site)
    assert said.split() == ["fused_attn", wheel.name.split("-")[1]]
    tests = tmp_path / "elsewhere"
    tests.mkdir()
    (tests / "test_it.py").write_text(
        "import torch, fused_attn\n"
        "def test_swapped_model_trains():\n"
        "    model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n"
        "    fused_attn.fuse(model)\n"
        "    model(torch.randn(2, 5, 16)).sum().backward()\n"
        f"    assert fused_attn.__file__.startswith({str(tmp_path)!r})\n"
    )
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, cwd=tests, **site)
