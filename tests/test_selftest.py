"""The self-test: a case that hangs or dies ends alone, and only what passed is recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn.__main__ import main
from fused_attn.ops.operations import OPERATIONS
from fused_attn.runtime import native, verified
from fused_attn.selftest import cases, run

POPEN = subprocess.Popen


def case(number: int, status: str, **more: Any) -> str:
    told = {"number": number, "case": f"case {number}", "dtype": "float32", "size": 0}
    return json.dumps({**told, "status": status, **more})


def script(*lines: str, end: str = "") -> str:
    return "\n".join([f"print({line!r}, flush=True)" for line in lines] + [end])


class Workers:
    """Scripts in the place of the workers, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scripts: list[str] = []
        self.skipped: list[str] = []
        monkeypatch.setattr(run.subprocess, "Popen", self._start)
        monkeypatch.setattr(run, "cases", lambda operation, quick: iter(range(4)))
        monkeypatch.setattr(run, "PATIENCE", 3.0)

    def _start(self, command: list[str], **how: Any) -> subprocess.Popen[str]:
        self.skipped.append(command[-1])
        return POPEN([sys.executable, "-c", self.scripts.pop(0)], **how)

    def examine(self, *scripts: str) -> list[run.Finding]:
        self.scripts = list(scripts)
        return list(run.examine("layer_norm", "cpu", "cpu", True))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


def test_a_case_that_kills_its_process_ends_alone(workers: Workers) -> None:
    found = workers.examine(
        script(case(0, "started"), case(0, "passed"), case(1, "started"),
               end="import os; os.abort()"),
        script(case(2, "started"), case(2, "passed"), case(3, "started"), case(3, "failed")),
    )  # fmt: skip
    assert [f["status"] for f in found] == ["passed", "died", "passed", "failed"]
    assert found[1]["case"] == "case 1"
    assert "exit -6" in found[1]["why"]
    assert workers.skipped == ["0", "2"]


def test_a_case_that_hangs_ends_alone(workers: Workers) -> None:
    found = workers.examine(
        script(case(0, "started"), end="import time; time.sleep(600)"),
        script(*(case(n, "passed") for n in (1, 2, 3))),
    )
    assert [f["status"] for f in found] == ["hung", "passed", "passed", "passed"]
    assert "said nothing for 3 s" in found[0]["why"]


def test_after_two_deaths_the_rest_is_left_out_and_nothing_of_it_counts(workers: Workers) -> None:
    dies = script(case(0, "started"), end="raise SystemExit(3)")
    again = script(case(1, "started"), end="raise SystemExit('no memory')")
    found = workers.examine(dies, again)
    assert [f["status"] for f in found] == ["died", "died", "left out"]
    assert "no memory" in found[1]["why"]
    assert run.passed(found) == set()


def test_a_worker_that_cannot_even_start_is_a_finding(workers: Workers) -> None:
    found = workers.examine(*[script(end="raise ImportError('torch')")] * 2)
    assert [f["status"] for f in found] == ["died", "died", "left out"]
    assert "ImportError: torch" in found[0]["why"]


def finding(status: str, size: int = 64, **more: Any) -> run.Finding:
    told = {"operation": "attention", "backend": "cuda", "dtype": "bfloat16", "case": "x"}
    return {**told, "size": size, "status": status, **more}


def test_a_key_passes_where_all_its_cases_did() -> None:
    found = [finding("passed", 64), finding("passed", 40), finding("passed", 128),
             finding("failed", 128), finding("refused", 256)]  # fmt: skip
    assert run.passed(found) == {"attention cuda bfloat16 64"}
    left_out = finding("left out", 0, dtype="")
    assert run.passed([*found, left_out]) == set()


def test_the_table_names_what_did_not_pass() -> None:
    text = run.table([finding("passed"), finding("hung", why="said nothing")])
    assert "attention        cuda       bfloat16       1    2" in text
    assert "HUNG attention cuda bfloat16: x: said nothing" in text


def test_a_record_is_kept_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verified, "machine", lambda index: {"capability": "9.0"})
    assert run.record([finding("passed")], "cpu") is None
    path = run.record([finding("passed"), finding("failed", 256)], "cuda")
    assert json.loads(path.read_text())["passed"] == ["attention cuda bfloat16 64"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_has_cases_of_every_dtype(operation: Any) -> None:
    for quick in (True, False):
        found = list(cases.cases(operation.name, quick))
        assert {each.dtype for each in found} == set(cases.DTYPES)
        assert len({(each.dtype, each.name) for each in found}) == len(found)


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
def test_a_real_worker_passes_and_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FUSED_ATTN_EMULATOR", raising=False)
    embedding = [operation for operation in OPERATIONS if operation.name == "embedding"]
    monkeypatch.setattr(run, "OPERATIONS", embedding)
    assert main(["selftest", "--quick", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {f["status"] for f in told["findings"]} == {"passed"}
    assert len(told["findings"]) == 8
    assert main(["selftest", "--quick", "--device", "cpu"]) == 0
    assert "8 cases on cpu" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["selftest", "--device", "cuda"])
    assert "`--device cuda` needs a GPU" in capsys.readouterr().err


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the case itself must fail where a result is off."""
    from fused_attn.ops.embedding import reference

    [first, *_] = cases.cases("embedding", True)
    right = reference.forward
    calls: list[int] = []

    def wrong(*arguments: Any) -> Any:
        calls.append(1)
        y = right(*arguments)
        return y * 1.01 if len(calls) == 1 else y  # ours comes first

    monkeypatch.setattr(reference, "forward", wrong)
    with pytest.raises(AssertionError, match="y: error"):
        first.run("reference", "cpu")
