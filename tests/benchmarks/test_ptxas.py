"""`python -m benchmarks.compiler.ptxas`, as far as it goes without a GPU."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compiler import ptxas
from benchmarks.compiler.ptxas import Finding

RIGHT = Finding("", "12 registers")


WRONG = Finding("AssertionError: dq", "")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What is said of what is found under both, and whether it is right."""

    def compare(own: dict[str, Finding], other: dict[str, Finding]) -> tuple[list[str], bool]:
        sides = {None: own, Path("other"): other}
        monkeypatch.setattr(ptxas, "run_under", lambda side, part, options: sides[side].items())
        right = ptxas.compare_all(Path("other"), "code", argparse.Namespace())
        *lines, _ = capsys.readouterr().out.splitlines()
        return [line.strip() for line in lines], right

    return compare


def test_what_both_agree_on_is_not_listed(compared: Any) -> None:
    assert compared({"a": RIGHT}, {"a": RIGHT}) == ([], True)


def test_other_registers_are_listed_and_no_fault(compared: Any) -> None:
    lines, right = compared({"a": RIGHT}, {"a": Finding("", "14 registers")})
    assert lines == ["a: own: 12 registers; other: 14 registers"]
    assert right


@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_wrong_under_one_only_is_a_fault(compared: Any, swapped: bool) -> None:
    sides = [{"a": RIGHT}, {"a": WRONG}]
    lines, right = compared(*(reversed(sides) if swapped else sides))
    assert "AssertionError: dq" in lines[-1]
    assert "right" in lines[-1]
    assert not right


def test_what_is_wrong_under_both_or_missing_is_a_fault(compared: Any) -> None:
    lines, right = compared({"a": WRONG}, {"a": WRONG})
    assert lines == ["a: own: AssertionError: dq", "a: both: AssertionError: dq"]
    assert not right
    assert compared({"a": RIGHT}, {}) == (["a: only under the own"], False)
    assert compared({}, {"a": RIGHT}) == (["a: only under the other"], False)


def test_who_is_stopped_has_said_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences are said when they are found, not at the end."""
    said: list[str] = []

    def found(side: Path | None, part: str, options: Any) -> Any:
        yield "a", RIGHT if side is None else WRONG
        if side is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(ptxas, "run_under", found)
    monkeypatch.setattr("builtins.print", lambda *words, **how: said.extend(words))
    with pytest.raises(KeyboardInterrupt):
        ptxas.compare_all(Path("other"), "code", argparse.Namespace())
    assert any("AssertionError: dq" in line for line in said)


def test_each_side_has_its_compiler_and_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/somewhere/ptxas")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache/1")
    own = ptxas.environment(None, "/cache/2")
    other = ptxas.environment(Path("/new/ptxas"), "/cache/2")
    assert not set(ptxas.VARIABLES) & set(own)
    assert [other[name] for name in ptxas.VARIABLES] == ["/new/ptxas"] * 2
    assert own["TRITON_CACHE_DIR"] == "/cache/1"
    assert other["TRITON_CACHE_DIR"] == "/cache/2"
    assert own["PATH"] == os.environ["PATH"]


def test_the_other_compiler_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    with pytest.raises(SystemExit, match="no ptxas at"):
        ptxas.find_other(str(tmp_path / "nothing"))
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho Build 13.9\n")
    tool.chmod(0o755)
    assert ptxas.find_other(str(tool)) == tool
    assert ptxas.version_of(tool) == "Build 13.9"
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    assert ptxas.find_other(None) == tool
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ptxas.find_other(None) == tool
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(ptxas, "TOOLKIT", str(tmp_path / "nowhere"))
    assert ptxas.find_other(None) is None


def test_without_another_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ptxas, "find_other", lambda asked: None)
    assert ptxas.main([]) == 0
    assert "nothing to compare" in capsys.readouterr().out


def test_parity_cases_are_run_and_digested() -> None:
    """In Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    found = dict(ptxas.cases("cpu", "below lanes"))
    assert len(found) == 2, "float16 and float32; bfloat16 is not served here"
    assert all(not finding.fault and len(finding.facts) == 16 for finding in found.values())
