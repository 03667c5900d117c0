"""The self-test: a case that hangs or dies ends alone, and only what passed is recorded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import UnsupportedError
from fused_attn.__main__ import main
from fused_attn.ops import attention
from fused_attn.ops.operations import OPERATIONS
from fused_attn.runtime import native, verified
from fused_attn.selftest import calls, cases, hard, memory, report, run, speed

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
        self.levels: list[str | None] = []
        monkeypatch.setattr(run.subprocess, "Popen", self._start)
        monkeypatch.setattr(run, "cases", lambda operation, how: iter(range(4)))
        monkeypatch.setattr(run, "PATIENCE", 3.0)

    def _start(self, command: list[str], **how: Any) -> subprocess.Popen[str]:
        self.skipped.append(command[-1])
        self.levels.append(how["env"].get("FUSED_ATTN_CPU"))
        return POPEN([sys.executable, "-c", self.scripts.pop(0)], **how)

    def examine(self, *scripts: str, **variant: Any) -> list[run.Finding]:
        self.scripts = list(scripts)
        chosen = run.Variant("quick", **variant)
        return list(run.examine("layer_norm", "cpu", "cpu", chosen))


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


def test_what_is_skipped_or_timed_alone_says_nothing() -> None:
    assert run.passed([finding("skipped"), finding("timed", ratio=2.0)]) == set()


def test_speed_is_kept_of_what_passed() -> None:
    found = [finding("passed", 64), finding("timed", 64, ratio=0.5),
             finding("failed", 128), finding("timed", 128, ratio=2.0)]  # fmt: skip
    assert run.speed(found) == {"attention cuda bfloat16 64": 0.5}


def test_the_table_names_what_did_not_pass() -> None:
    text = report.table([finding("passed"), finding("hung", why="said nothing"),
                         finding("timed", ratio=1.234)])  # fmt: skip
    assert "1/2 1.23x" in text
    assert "HUNG attention cuda bfloat16: x: said nothing" in text
    assert "below 1 torch is faster" in text


def test_the_table_says_what_was_skipped_and_why() -> None:
    text = report.table(
        [
            finding("passed"),
            finding("skipped", case="graph", why="needs a GPU"),
            finding("skipped", case="graph", dtype="float32", why="needs a GPU"),
        ]
    )
    assert "skipped, needs a GPU: graph" in text
    assert text.count("needs a GPU") == 1


def test_the_table_fits_a_screen() -> None:
    """All that there is: every backend of every operation, and many cases that fail."""
    found = [
        finding(status, operation=operation.name, backend=backend.NAME, dtype=dtype, ratio=9.99,
                why="w" * 300, variant="portable")
        for operation in OPERATIONS for backend in operation.backends for dtype in cases.DTYPES
        for status in ("passed", "timed", "failed")
    ]  # fmt: skip
    lines = report.table(found).splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 100 for line in lines if not line.startswith("FAILED"))
    assert any("more" in line for line in lines)


def test_what_a_record_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verified, "machine", lambda index: {"capability": "9.0"})
    told = [finding("passed"), finding("timed", ratio=1.5), finding("failed", 256)]
    path = run.record(told, "cuda")
    kept = json.loads(path.read_text())
    assert kept["passed"] == ["attention cuda bfloat16 64"]
    assert kept["speed"] == {"attention cuda bfloat16 64": 1.5}
    assert verified.read(path, {"capability": "9.0"}).speed == kept["speed"]


def test_a_test_that_is_stopped_has_kept_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: the record grows with each operation and backend."""
    told = iter([[finding("passed")], KeyboardInterrupt])
    kept: list[set[str]] = []

    def examine(*who: Any) -> Any:
        found = next(told)
        if found is KeyboardInterrupt:
            raise KeyboardInterrupt
        yield from found

    first, second = (types.SimpleNamespace(name=name) for name in ("attention", "layer_norm"))
    backend = types.SimpleNamespace(NAME="cuda")
    monkeypatch.setattr(run, "able", lambda device: [(first, backend), (second, backend)])
    monkeypatch.setattr(run, "examine", examine)
    monkeypatch.setattr(run, "record", lambda found, device: kept.append(run.passed(found)))
    with pytest.raises(KeyboardInterrupt):
        run.main(["--device", "cpu"])
    assert kept == [{"attention cuda bfloat16 64"}]


def test_a_cpu_is_tried_at_each_level_and_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(
        cpu_level=lambda: "b", available_cpu_levels=lambda: ["a", "b", "c"]
    )
    monkeypatch.setattr(native, "module", lambda: module)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [str(v) for v in run.variants("cpu", "quick")] == ["", "a", "c", "1 thread"]
    assert [v.how for v in run.variants("cpu", "full")] == ["full", *["sample"] * 3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [str(v) for v in run.variants("cpu", "quick")] == ["", "a", "c"]
    assert [str(v) for v in run.variants("cuda", "quick")] == [""]


def test_a_level_is_the_workers_environment(workers: Workers) -> None:
    found = workers.examine(script(*(case(n, "passed") for n in range(4))), level="portable")
    assert workers.levels == ["portable"]
    assert {f["variant"] for f in found} == {"portable"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_has_cases_of_every_dtype(operation: Any) -> None:
    for how in ("quick", "full"):
        found = list(cases.cases(operation.name, how))
        assert {each.dtype for each in found} == set(cases.DTYPES)
        assert len({(each.dtype, each.name, each.size) for each in found}) == len(found)
        assert found[0].name == "cold thread", "it must be the first thing that a process does"
    assert len(list(cases.cases(operation.name, "sample"))) < len(found)


WANTED = ("cold thread", "ends at the end of its memory", "20 repeats bit by bit",
          "captured in a CUDA graph", "second device")  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_what_goes_wrong_on_hardware_is_asked_of_every_operation(operation: Any) -> None:
    names = {each.name for each in cases.cases(operation.name, "quick")}
    assert set(WANTED) <= names
    if operation.name == "attention":
        assert {"64k tokens of a packed tensor", "head size 37 into a slice"} <= names
    if operation.name == "layer_norm":
        assert {"growing widths, backward", "width 97 into a slice"} <= names


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
    assert {f["status"] for f in told["findings"]} == {"passed", "timed", "skipped"}
    skipped = {f["case"]: f["why"] for f in told["findings"] if f["status"] == "skipped"}
    assert skipped == {
        "captured in a CUDA graph": "needs a GPU", "second device": "needs two GPUs",
    }  # fmt: skip
    assert main(["selftest", "--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"{len(told['findings'])} cases on cpu" in said
    assert "skipped, needs a GPU: captured in a CUDA graph" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["selftest", "--device", "cuda"])
    assert "`--device cuda` needs a GPU" in capsys.readouterr().err


Wrong = Callable[[Tensor], Tensor]


@pytest.fixture
def mistaken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Wrong], None]:
    """Plants a mistake in an operation's public path."""

    def plant(operation: Any, wrong: Wrong) -> None:
        right = operation.call.run

        def run(operands: Any, scalars: Any, *rest: Any, **named: Any) -> Any:
            result = right(operands, scalars, *rest, **named)
            if not isinstance(result, tuple):
                return wrong(result)
            return (wrong(result[0]), *result[1:])

        monkeypatch.setattr(operation.call, "run", run)

    return plant


def call_of(dtype: str = "float32") -> calls.Call:
    return calls.attention(dtype, 16, (1, 2, 2, 20, 30), {"causal": True})


def test_a_right_call_passes_every_check() -> None:
    for check in (hard.cold_thread, hard.at_the_end_of_memory, hard.repeats):
        check(call_of, "reference", "cpu")
    hard.into_a_slice("float32", 13, "reference", "cpu")
    hard.norm_into_a_slice("float32", "reference", "cpu")


def test_a_wrong_result_is_found(mistaken: Any) -> None:
    mistaken(attention, lambda x: x * 1.01)
    for check in (hard.cold_thread, hard.at_the_end_of_memory):
        with pytest.raises(AssertionError, match="out: error"):
            check(call_of, "reference", "cpu")


def test_results_that_do_not_repeat_are_found(mistaken: Any) -> None:
    drift = iter(range(100))
    mistaken(attention, lambda x: x + 1e-6 * next(drift))
    with pytest.raises(AssertionError, match="two runs differ"):
        hard.repeats(call_of, "reference", "cpu")


def test_what_is_overwritten_beside_a_slice_is_found(mistaken: Any) -> None:
    def beyond(x: Tensor) -> Tensor:
        if x.stride(-2) > x.shape[-1]:  # the slice
            x.detach().as_strided((1,), (1,), x.storage_offset() + x.shape[-1]).fill_(0.0)
        return x

    mistaken(attention, beyond)
    with pytest.raises(AssertionError, match="beside `out` was overwritten"):
        hard.into_a_slice("float32", 13, "reference", "cpu")


def test_an_element_that_is_not_written_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, plain in (("empty", torch.zeros), ("empty_like", torch.zeros_like)):
        monkeypatch.setattr(torch, name, plain)  # no longer what the tests' own poison is in
    with memory.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.empty(3, dtype=torch.int64).tolist() == [0, 0, 0]
    assert torch.empty is torch.zeros


READS_ON = """
import ctypes, torch
from fused_attn.selftest import memory
x = memory.at_the_end(torch.arange(5.0))
assert x.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
print(ctypes.c_float.from_address(x.data_ptr() + 4 * {element}).value, flush=True)
"""


def test_the_end_of_memory_is_the_end() -> None:
    """An element within is read; the next one ends the process, and with it the case alone."""
    inside, beyond = (
        subprocess.run([sys.executable, "-c", READS_ON.format(element=n)], capture_output=True)
        for n in (4, 5)
    )
    assert inside.stdout == b"4.0\n"
    assert inside.returncode == 0
    if sys.platform == "linux":
        assert beyond.returncode == -signal.SIGSEGV


def test_speed_is_torchs_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def once(call: calls.Call, backend: str, training: bool) -> None:
        asked.append((backend, training))
        time.sleep(0.002 if backend == "torch" else 0.006)

    monkeypatch.setattr(speed, "_once", once)
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    found = speed.ratio("layer_norm", "float32", 0, "cpu", "cpu")
    assert 0.1 < found < 0.9
    assert {("cpu", False), ("cpu", True), ("torch", False), ("torch", True)} == set(asked)


def test_what_torch_cannot_run_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*what: Any) -> None:
        raise UnsupportedError("no\n  torch: why")

    monkeypatch.setattr(speed, "_once", refuse)
    with pytest.raises(memory.Skipped, match="torch: why"):
        speed.ratio("layer_norm", "float32", 0, "cpu", "cpu")


def test_stand_ins_for_a_gpu_are_no_part_of_a_cpus_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator and Triton's interpreter would take hours, and say nothing of this machine."""
    for operation in OPERATIONS:
        for backend in operation.backends:
            monkeypatch.setattr(backend, "why_not", lambda problem: [])
    shown = {backend.NAME for _, backend in run.able(torch.device("cpu"))}
    assert shown == {"cpu"}
