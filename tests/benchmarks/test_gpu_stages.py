"""The stages of `make gpu` on a GPU that is not there: what runs, how long, what a kill leaves."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import machine, parts, stage
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.suites import machine as suites_machine

ROOT = Path(__file__).parents[2]
NAMES = {n: [part.name for part in parts.of_stage(n)] for n in parts.STAGES}
WITHIN = "benchmarks/results/stub"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU in name, and parts that say that they ran and write a result."""
    monkeypatch.setattr(machine, "why_not", lambda: None)
    monkeypatch.setattr(machine, "WORK", tmp_path / "work")
    monkeypatch.setattr(suites_machine, "folder_name", lambda device="cpu": "stub")
    facts = {"gpu": "stub", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}
    monkeypatch.setattr(
        machine, "write", lambda folder: (folder / "machine.json").write_text(json.dumps(facts))
    )
    monkeypatch.setattr(stage, "REFRESH", 0.05)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        Part, "command", property(lambda part: ("sh", "-c", script(part, tmp_path)))
    )
    return tmp_path


def script(part: Part, folder: Path) -> str:
    """Says its name, leaves a result, and ends; or waits, where the test wants it to."""
    return (
        f"echo {part.name} >> {folder}/ran; echo figures > $FUSED_ATTN_RESULTS/{part.name}.csv; "
        f"echo said by {part.name}; test ! -e {folder}/wait-{part.name} || exec sleep 60; "
        f"test ! -e {folder}/fail-{part.name}"
    )


def ran(folder: Path) -> list[str]:
    path = folder / "ran"
    return path.read_text().split() if path.exists() else []


def archived(folder: Path, number: int) -> dict[str, str]:
    """The archive's files by their name within the results' folder."""
    with tarfile.open(folder / "out" / f"stub-stage-{number}.tar.gz") as file:
        found = {}
        for member in file.getmembers():
            assert member.name.startswith(f"{WITHIN}/"), "it unpacks where results belong"
            content = file.extractfile(member)
            assert content is not None
            found[member.name.removeprefix(f"{WITHIN}/")] = content.read().decode()
        return found


def outcomes(files: dict[str, str], number: int) -> dict[str, str]:
    told = json.loads(files[f"stage-{number}.json"])
    assert told["stage"] == number
    return {row["part"]: row["outcome"] for row in told["parts"]}


def start(number: int, folder: Path) -> int:
    return gpu.main(["--stage", str(number), "--results", str(folder / "out")])


@pytest.mark.parametrize("number", parts.STAGES)
def test_a_stage_runs_its_parts_in_order_and_leaves_one_archive(stub: Path, number: int) -> None:
    assert start(number, stub) == 0
    assert ran(stub) == NAMES[number]
    files = archived(stub, number)
    assert outcomes(files, number) == dict.fromkeys(NAMES[number], "ok")
    for name in NAMES[number]:
        assert files[f"{name}.csv"] == "figures\n"
        assert files[f"logs/{name}.log"] == f"said by {name}\n"
    assert "commit abc" in files[f"stage-{number}.txt"]
    assert [path.name for path in (stub / "out").iterdir()] == [f"stub-stage-{number}.tar.gz"]


ORDERS = {
    1: ["map-shift", "build", "info", "norm-widths", "cold-thread", "packed-64k", "overlap",
        "compile", "parity-cuda", "parity-triton"],
    2: ["build", "compile-measured", "ceilings", "attention-8k", "attention", "norms", "masks",
        "decode", "modules"],
    3: ["build", "compile-checked", "memcheck", "racecheck", "launches", "repeat", "deterministic",
        "overhead", "tuning", "ptxas", "racecheck-backward"],
}  # fmt: skip


@pytest.mark.parametrize("number", parts.STAGES)
def test_what_a_stage_is_and_how_long_it_may_take(number: int) -> None:
    own = parts.of_stage(number)
    assert [part.name for part in own] == ORDERS[number]
    assert sum(part.limit for part in own) <= parts.LIMIT < 9 * 60
    assert len({part.name for part in own}) == len(own)
    assert f"stage {number}, at most {sum(part.limit for part in own)} s" in gpu.listing()


def test_every_part_is_there_to_be_run() -> None:
    """Modules import, tests exist, functions are found: before a card is lent for them."""
    for part in PARTS:
        if callable(part.work):
            assert parts.find(part.name).work is part.work
            assert part.command[-2:] == ("--part", part.name)
            continue
        for word in part.command:
            if word.startswith("tests/"):
                assert (ROOT / word).is_file(), part.name
            elif word.startswith(("benchmarks.", "fused_attn")):
                assert importlib.util.find_spec(word) is not None, part.name


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "racecheck-backward"])
def test_no_sanitizer_compiles(tool: str) -> None:
    """What a sanitizer checks, and no less, the part before it compiles."""
    names = NAMES[3]
    assert names.index("compile-checked") < names.index(tool)
    chosen = [word for flag in ("--match", "--dtypes") for word in _after(flag, tool)]
    assert chosen == [
        w for flag in ("--match", "--dtypes") for w in _after(flag, "compile-checked")
    ]
    assert "--no-compiling" in parts.find(tool).command


def _after(flag: str, name: str) -> list[str]:
    command = parts.find(name).command
    return [command[command.index(flag) + 1]]


def test_a_part_that_fails_counts_and_the_next_ones_run(stub: Path) -> None:
    (stub / "fail-racecheck-backward").touch()
    assert start(3, stub) == 0, "its reports are to be read, and are no verdict"
    (stub / "fail-memcheck").touch()
    assert start(3, stub) == 1
    told = outcomes(archived(stub, 3), 3)
    assert told["memcheck"] == "failed (1)"
    assert ran(stub)[-len(NAMES[3]) :] == NAMES[3]


def test_one_that_hangs_is_ended_and_what_does_not_fit_is_said(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stub / "wait-compile-measured").touch()
    monkeypatch.setattr(stage, "LEAST", 1.0)
    arguments = ["--stage", "2", "--results", str(stub / "out"), "--budget", "2.5"]
    assert gpu.main(arguments) == 1
    told = outcomes(archived(stub, 2), 2)
    assert told["build"] == "ok"
    assert told["compile-measured"].startswith("took longer than")
    assert told["attention"] == "no time left"


def test_parts_are_picked_by_name(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        gpu.main(["--stage", "1", "--results", str(stub / "out"), "--only", "info", "build"]) == 0
    )
    assert ran(stub) == ["build", "info"]
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "1", "--only", "memcheck"])
    assert "stage 1 has map-shift, build" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize(("number", "name"), [(n, name) for n in NAMES for name in NAMES[n]])
def test_a_kill_at_any_point_leaves_what_there_is(
    stub: Path, number: int, name: str, how: signal.Signals
) -> None:
    (stub / f"wait-{name}").touch()
    child = os.fork()
    if child == 0:  # the stage, as it is stubbed here
        with contextlib.suppress(BaseException), open(os.devnull, "w") as sys.stdout:
            os._exit(start(number, stub))
        os._exit(99)
    before = NAMES[number][: NAMES[number].index(name)]
    try:
        _wait_until(lambda: ran(stub) == [*before, name])
        _wait_until(lambda: f"{name}.csv" in archived(stub, number))
    finally:
        os.kill(child, how)
        _, status = os.waitpid(child, 0)
    files = archived(stub, number)
    told = outcomes(files, number)
    assert [told[each] for each in before] == ["ok"] * len(before)
    assert list(told) == [*before, name], "nothing is said of what did not begin"
    for each in (*before, name):
        assert files[f"{each}.csv"] == "figures\n"
    if how == signal.SIGTERM:
        assert os.waitstatus_to_exitcode(status) == 1
        assert told[name] == "ended by SIGTERM"
        assert name in files[f"stage-{number}.txt"]
    else:
        assert told[name] == "running"


def _wait_until(holds) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError, tarfile.TarError):
            if holds():
                return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def test_a_copy_without_history_says_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(suites_machine, "CHECKOUT", tmp_path)
    suites_machine._commit.cache_clear()
    try:
        monkeypatch.setenv("FUSED_ATTN_COMMIT", "1234abcd")
        assert suites_machine._commit() == "1234abcd"
        suites_machine._commit.cache_clear()
        monkeypatch.delenv("FUSED_ATTN_COMMIT")
        assert suites_machine._commit() == "none"
    finally:
        suites_machine._commit.cache_clear()


@pytest.mark.parametrize(("word", "code"), [("", 1), ("warn", 0)])
def test_a_spill_there_is_a_warning(tmp_path: Path, word: str, code: int) -> None:
    """The build of a stage goes on where another nvcc spills; elsewhere it fails."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'ptxas info: 12 bytes spill stores' >&2\n")
    nvcc.chmod(0o755)
    assert ("FUSED_ATTN_PTXAS", "warn") in parts.find("build").environment
    done = subprocess.run(
        [sys.executable, ROOT / "csrc" / "cuda" / "check_ptxas.py", nvcc, "kernel.cu"],
        env={**os.environ, "FUSED_ATTN_PTXAS": word}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert "12 bytes spill stores" in done.stderr
