"""The list of mistakes that `python -m tests.mutants` plants: that it still fits the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import Mutant

KNOWN = mutants.read()


def test_every_mistake_can_still_be_planted() -> None:
    assert [f"{x.name}: {why}" for x in KNOWN if (why := x.why_not(mutants.ROOT))] == []


def test_there_are_mistakes_of_every_kind() -> None:
    kinds = [mutant.target or ("triton" if "/triton/" in mutant.file else "python")
             for mutant in KNOWN]  # fmt: skip
    assert len(KNOWN) >= 60
    assert {kind: kinds.count(kind) >= 10 for kind in ("_C", "_emulator", "triton", "python")} == {
        "_C": True, "_emulator": True, "triton": True, "python": True,
    }  # fmt: skip


def test_their_tests_exist() -> None:
    for mutant in KNOWN:
        words = shlex.split(mutant.tests)
        for word in words[: words.index("-k") if "-k" in words else None]:
            path, _, name = word.partition("::")
            assert (mutants.ROOT / path).exists(), mutant.name
            assert not name or f"def {name}(" in (mutants.ROOT / path).read_text(), mutant.name


def written(folder: Path, text: str) -> Sequence[str]:
    path = folder / "list.toml"
    path.write_text(text)
    return ["--file", str(path)]


ENTRY = """
[[mutant]]
name = "moved"
file = "fused_attn/convert.py"
old = "no line of it is like this"
new = ""
tests = "tests/test_convert.py"
"""


def test_one_that_does_not_apply_is_said_so_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutants.main(written(tmp_path, ENTRY)) == 1
    assert "moved: its old text stands 0 times in fused_attn/convert.py" in capsys.readouterr().err
    assert mutants.main(written(tmp_path, ENTRY.replace("convert.py", "gone.py"))) == 1
    assert "moved: there is no fused_attn/gone.py" in capsys.readouterr().err


MISTAKES = {
    "lacks": (ENTRY.replace('new = ""', ""), r"mutant 'moved' lacks \['new'\]"),
    "unknown": (f"{ENTRY}why = 1", r"mutant 'moved' has an unknown \['why'\]"),
    "twice": (ENTRY * 2, "mutant 'moved' is there twice"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_list_are_named(name: str, tmp_path: Path) -> None:
    text, message = MISTAKES[name]
    with pytest.raises(SystemExit, match=message):
        mutants.main(written(tmp_path, text))


def test_a_name_that_is_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutants.main(["--only", "nobody is called so"])
    assert "no mutant's name or file contains" in capsys.readouterr().err


VERDICTS = {
    "a test": (
        1,
        "FAILED tests/x.py::test_y - assert 1\n1 failed",
        ("caught", "tests/x.py::test_y"),
    ),
    "collection": (2, "ERROR tests/x.py - ImportError", ("caught", "tests/x.py")),
    "a crash": (-11, "", ("caught", "segmentation fault")),
    "too long": (None, "", ("caught", "its tests ran for more than 9 s")),
    "nothing": (0, "3 passed, 2 skipped in 1 s", ("survived", "")),
    "skipped": (0, "2 skipped in 1 s", ("no test ran", "2 skipped in 1 s")),
    "deselected": (5, "7 deselected in 1 s", ("no test ran", "7 deselected in 1 s")),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_what_pytest_says_becomes_a_verdict(name: str) -> None:
    status, said, verdict = VERDICTS[name]
    assert mutants.verdict(status, said, 9) == verdict


def test_a_mutant_knows_what_is_compiled_of_it() -> None:
    def target(file: str) -> str | None:
        return Mutant("", file, "", "", "")._replace(file=file).target

    assert target("csrc/attention/cpu/score.h") == "_C"
    assert target("csrc/cpu/rows.h") == "_C"
    assert target("csrc/attention/sm90/score.h") == "_emulator"
    assert target("csrc/layer_norm/cuda/rows.h") == "_emulator"
    assert target("csrc/cuda/philox.h") == "_emulator"
    assert target("fused_attn/convert.py") is None
    names = re.findall(r"^name = ", mutants.LIST.read_text(), re.M)
    assert len(names) == len(KNOWN)
