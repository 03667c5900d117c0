"""The first questions to a GPU and what they stand on, as far as that goes without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, machine, parity, questions
from benchmarks.gpu import compile as compile_part
from fused_attn.runtime import native
from fused_attn.selftest import long

ROOT = Path(__file__).parents[2]
SHIFTS = ("0", "2 MB", "64 MB", "1 GB", "4 GB")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.why_not() is not None:
        pytest.skip("no compiled part")
    monkeypatch.setattr(questions, "DEVICE", "cpu")
    monkeypatch.setattr(questions, "BACKENDS", ("cpu",))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", ["norm_widths", "cold_thread"])
def test_a_question_is_answered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(questions, name)()
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.endswith(" right") for line in lines)


@pytest.mark.usefixtures("on_the_cpu")
def test_64k_tokens_are_asked_for_with_a_window_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(long, "check", lambda *what: asked.append(what))
    questions.packed_64k()
    assert asked == [("cpu", "cpu", torch.bfloat16, 512), ("cpu", "cpu", torch.bfloat16, None)]
    assert long.TOKENS == 65_536


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Path]]:
    """Which orders of the exponentials were timed, and which module each process had."""
    found = []
    truly_run = subprocess.run

    def run(command: list[str], cwd: Path, env: dict[str, str], check: bool) -> None:
        show = "import fused_attn; print(fused_attn.__file__)"
        process = truly_run(
            [sys.executable, "-c", show], cwd=cwd, env=env, capture_output=True, text=True
        )
        package = Path(process.stdout.strip()).parent
        found.append((command[-1], next(package.glob("_C.*")).resolve()))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(machine, "WORK", tmp_path)
    return found


def test_both_orders_of_the_exponentials_are_timed_by_turns(
    asked: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if native.why_not() is not None:
        pytest.skip("no compiled part")
    mine = Path(native.module().__file__).resolve()
    late = tmp_path / "built" / mine.name
    late.parent.mkdir()
    shutil.copy2(mine, late)
    monkeypatch.setattr(questions, "late_module", lambda: late)
    questions.overlap()
    assert asked == [("beside the product", mine), ("behind it", late)] * 2


def test_without_the_other_module_the_question_says_so(
    asked: list[tuple[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(questions, "late_module", lambda: None)
    questions.overlap()
    assert [name for name, _ in asked] == ["beside the product"] * 2
    assert "there is no _C_late" in capsys.readouterr().out


def test_an_error_is_an_answer_and_the_next_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> str:
        raise RuntimeError("cudaErrorIllegalAddress")

    with pytest.raises(SystemExit):
        questions.answer({"a": fails, "b": lambda: "right"})
    first, second = capsys.readouterr().out.splitlines()
    assert "RuntimeError: cudaErrorIllegalAddress" in first
    assert second.split() == ["b", "right"]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_long_check_finds_what_is_off(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    from fused_attn.ops.attention import reference

    def shifted(*arguments, **named):
        out, *rest = right(*arguments, **named)
        return out * 1.02 if wrong else out, *rest

    right = reference.forward
    monkeypatch.setattr(reference, "forward", shifted)
    how = {"tokens": 700, "heads": 2}
    for window in (None, 100):
        if not wrong:
            long.check("reference", "cpu", torch.float32, window, **how)
            continue
        with pytest.raises(AssertionError, match="out: error"):
            long.check("reference", "cpu", torch.float32, window, **how)


def test_the_map_program_compiles_and_survives_its_answers(tmp_path: Path) -> None:
    """Each answer is a process of its own, so an error (here: no GPU) ends one line."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    program = tmp_path / "map_shift"
    source = Path(questions.__file__).with_name("map_shift.cu")
    target = "-gencode=arch=compute_90a,code=sm_90a"
    subprocess.run(["nvcc", "-std=c++17", target, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["memory", "shift", "what", "answer"]
    assert [tuple(line[:24].strip().split(maxsplit=1)) for line in lines] == [
        (memory, f"{shift:<6} {what}")
        for memory in ("malloc", "reserved")
        for shift in SHIFTS
        for what in ("load", "store")
    ]
    if not torch.cuda.is_available():
        assert done.returncode == 1
        assert all("cudaError" in line for line in lines)


SAME_KERNELS = """
import torch
from benchmarks.gpu import checks
from tests.cases.count_compilations import asked

for name in ("small masks, head 40", "small plain, head 128", "long causal, head 64"):
    case = {**checks.SMALL, **checks.LONG}[name]
    with asked() as beforehand:
        checks.all_checks()[name].call(torch.bfloat16)
    with asked() as launched, checks.guarded() as guards:
        tensors = case.tensors(torch.bfloat16)
        checks.results(case, "triton", {n: guards.fenced(x, n) for n, x in tensors.items()})
    print(name, len(launched), launched.keys() == beforehand.keys())
"""


def test_what_is_compiled_beforehand_is_what_the_checks_launch() -> None:
    """Tensors without memory ask for the kernels that the checks' guarded tensors ask for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SAME_KERNELS],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        *_, count, same = line.split()
        assert int(count) >= 4, line
        assert same == "True", line


def test_calls_compile_into_one_cache_and_once(tmp_path: Path) -> None:
    """The second time everything is there, and a process that must not compile is content."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = (sys.executable, "-m", "benchmarks.gpu.compile", "--jobs", "1", "--arch", "90",
               "--match", "norm (5, 1) None", "--dtypes", "bf16")  # fmt: skip
    first, second = (
        subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.stdout.startswith("2 kernels compiled, 0 were there; 1 calls, 0 failed")
    assert second.stdout.startswith("0 kernels compiled, 2 were there; 1 calls, 0 failed")
    assert first.returncode == second.returncode == 0
    refused = "from benchmarks.gpu import compile\ncompile.refuse_to_compile()\n"
    refused += "print(compile.compile_one(90, 'norm (5, 1) None | {}'))"
    said = [
        subprocess.run((sys.executable, "-c", refused.format(dtype)), env=environment, cwd=ROOT,
                       capture_output=True, text=True).stdout
        for dtype in ("bf16", "fp16")
    ]  # fmt: skip
    assert said[0] == "({'compiled': 0, 'found': 2}, '')\n"
    assert "this kernel was not compiled beforehand" in said[1]


def test_all_but_the_random_checks_are_compiled_the_longest_first() -> None:
    names = compile_part.names("", ["bf16", "fp16", "fp32"])
    assert len(names) == 3 * sum(not check.random for check in checks.all_checks().values())
    order = [name.split(" | ")[0].split()[0] for name in names]
    assert order.index("long") < order.index("small") < order.index("norm")
    assert not any(name.startswith("random") for name in names)


def test_checks_of_the_same_kernels_are_a_family() -> None:
    long_64 = parity.family("cuda | long full, head 64 | bf16 | default")
    assert long_64 == parity.family("cuda | small plain, head 40 | fp16 | deterministic")
    assert long_64 != parity.family("triton | long full, head 64 | bf16 | default")
    assert long_64 != parity.family("cuda | long full, head 96 | bf16 | default")
    assert long_64 != parity.family("cuda | long full, head 64 | fp32 | default")
    assert "norm" in parity.family("triton | norm (5, 1) None | bf16 | default")
