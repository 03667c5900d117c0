"""What a release is made of says the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fused_attn import __version__

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_wheels_are_built_for_the_pythons_that_the_classifiers_name() -> None:
    named = re.findall(r"Programming Language :: Python :: 3\.(\d+)", PYPROJECT)
    assert re.findall(r"cp3(\d+)-\*", PYPROJECT) == named
    assert f'requires-python = ">=3.{named[0]}"' in PYPROJECT


def test_the_version_is_one() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited
    assert cited[1] == __version__


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_hosted_runners_call_targets_and_files_that_there_are(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"^[\s-]*(?:run: )?make ([\w.-]+)", text, re.M):
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.M), target
    for name in re.findall(r"(?<![\w./])(?:tests|\.ci)/[\w/.]+", text):
        assert (ROOT / name).exists(), name


def test_build_tools_of_dev_are_those_of_the_build_system() -> None:
    [system] = re.findall(r"^requires = \[(.*)\]$", PYPROJECT, re.M)
    assert system.replace(" ", "") in PYPROJECT.partition("dev = [")[2].replace(" ", "")
