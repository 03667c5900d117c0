"""Trials among the shipped tiles: on request only, kept on disk; by a fake clock, interpreted."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import attention
from fused_attn.runtime.triton import device as triton_device
from fused_attn.runtime.triton import tuning

pytest.importorskip("triton", reason="Triton is not installed")

CPU = torch.device("cpu")
PLAIN = "head 64, 4 bytes, plain"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, empty; nothing that a test finds outlives it."""
    if not triton_device.interpreted():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FUSED_ATTN_TUNING", raising=False)
    tuning.forget()
    yield tmp_path / "fused_attn"
    tuning.forget()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(kernel, rows, columns) of every launch that has tiles of scores."""
    seen = []
    launch = triton_device.launch

    def noting(kernel: Any, programs: int, *args: Any, warps: int, stages: int) -> None:
        if hasattr(args[-1], "BLOCK_M"):
            seen.append((kernel.__name__, args[-1].BLOCK_M.value, args[-1].BLOCK_N.value))
        launch(kernel, programs, *args, warps=warps, stages=stages)

    monkeypatch.setattr(triton_device, "launch", noting)
    return seen


def clock(*milliseconds: float | Exception) -> Callable[[Callable[[], None]], float]:
    """A timer that launches what it times, and says one of these after the other."""
    readings = list(milliseconds)

    def timer(run: Callable[[], None]) -> float:
        run()
        reading = readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading

    return timer


def forbidden(run: Callable[[], None]) -> float:
    raise AssertionError("something is timed")


def tensors(requires_grad: bool = False) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 1, 20, 8, requires_grad=requires_grad) for _ in range(3))


def call(**arguments: Any) -> Tensor:
    return attention(*tensors(), backend="triton", **arguments)


def machine_file(folder: Path) -> Path:
    return folder / triton_device.machine(CPU).file_name()


def tiles(kernel: str) -> list[tuple[int, ...]]:
    from fused_attn.ops.attention.triton.tiles import INTERPRETED

    return [tuple(tile) for tile in INTERPRETED[kernel]]


def test_the_fastest_is_taken_kept_and_read_again(
    own_folder: Path, launched: list[tuple[str, int, int]]
) -> None:
    default, second, third = tiles("forward")
    found = fused_attn.autotune(*tensors(), backend="triton", timer=clock(3.0, 2.0, 1.0))
    trial = found[f"forward: {PLAIN}"]
    assert trial.chosen == third
    assert trial.milliseconds == {default: 3.0, second: 2.0, third: 1.0}
    # Three candidates, then the result itself, with the winner.
    assert [tile for _, *tile in launched] == [list(x[:2]) for x in (default, second, third, third)]
    del launched[:]
    call()
    tuning.forget()  # as in another process
    call()
    assert [tuple(tile) for _, *tile in launched] == [third[:2]] * 2
    content = json.loads(machine_file(own_folder).read_text())
    assert content["machine"] == triton_device.machine(CPU)._asdict()
    assert content["choices"] == [["forward", PLAIN, list(third)]]


def test_the_backward_is_tried_too_and_files_grow(own_folder: Path) -> None:
    fused_attn.autotune(*tensors(), backend="triton", timer=clock(3.0, 1.0, 2.0))
    inputs = tensors(requires_grad=True)
    found = fused_attn.autotune(*inputs, backend="triton", causal=True,
                                timer=clock(1.0, 2.0, 3.0, 2.0, 1.0, 1.0, 2.0))  # fmt: skip
    assert [name.split(":")[0] for name in found] == ["forward", "dkdv", "dq"]
    assert found[f"dkdv: {PLAIN}, band"].chosen == tiles("dkdv")[1]
    choices = json.loads(machine_file(own_folder).read_text())["choices"]
    assert len(choices) == 4
    assert all(x.grad is None for x in inputs)
    assert [path.name for path in own_folder.iterdir()] == [machine_file(own_folder).name]


def test_a_candidate_that_fails_is_passed_over(launched: list[tuple[str, int, int]]) -> None:
    default, second, third = tiles("forward")
    timer = clock(2.0, RuntimeError("out of shared memory"), 3.0)
    trial = fused_attn.autotune(*tensors(), backend="triton", timer=timer)[f"forward: {PLAIN}"]
    assert trial.chosen == default
    assert trial.failed == {second: "RuntimeError: out of shared memory"}
    assert set(trial.milliseconds) == {default, third}
    timer = clock(*[RuntimeError("no clock")] * 3)
    trial = fused_attn.autotune(*tensors(), backend="triton", timer=timer)[f"forward: {PLAIN}"]
    assert trial.milliseconds == {}
    assert tuple(launched[-1][1:]) == default[:2]


def test_nothing_is_tried_unasked(
    own_folder: Path, launched: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_milliseconds", forbidden)
    call()
    assert [tuple(tile) for _, *tile in launched] == [tiles("forward")[0][:2]]
    assert not own_folder.exists()


def test_within_a_context_only_what_is_unknown_is_tried() -> None:
    with fused_attn.autotuning(clock(2.0, 1.0, 3.0)) as found:
        call()
        call()
    assert list(found) == [f"forward: {PLAIN}"]
    with fused_attn.autotuning(forbidden) as found:
        call()
    assert found == {}


def test_the_environment_asks_for_trials_or_forbids_the_files(
    own_folder: Path, launched: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_milliseconds", clock(2.0, 1.0, 3.0))
    monkeypatch.setenv("FUSED_ATTN_TUNING", "on")
    call()
    assert machine_file(own_folder).exists()
    assert tuple(launched[-1][1:]) == tiles("forward")[1][:2]
    tuning.forget()
    monkeypatch.setenv("FUSED_ATTN_TUNING", "off")
    call()
    assert tuple(launched[-1][1:]) == tiles("forward")[0][:2]
    tuning.forget()
    monkeypatch.setenv("FUSED_ATTN_TUNING", "maybe")
    with pytest.raises(ValueError, match="FUSED_ATTN_TUNING must be one of off, read, on, got 'm"):
        call()


def test_nothing_is_tried_while_a_graph_is_captured(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured"):
        fused_attn.autotune(*tensors(), backend="triton", timer=forbidden)
    with fused_attn.autotuning(forbidden) as found:
        call()
    assert found == {}
    assert not own_folder.exists()
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    with fused_attn.autotuning(clock(1.0, 2.0, 3.0)) as found:
        call()  # the captured call settled nothing
    assert len(found) == 1


BROKEN = {
    "cut off": '{"format": 1, "machine"',
    "not ours": "[1, 2]",
    "another format": '{"format": 99}',
    "another machine": json.dumps({"format": 1, "machine": {"gpu": "other"}, "choices": []}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_file_is_ignored_aloud(
    name: str, own_folder: Path, launched: list[tuple[str, int, int]]
) -> None:
    own_folder.mkdir()
    machine_file(own_folder).write_text(BROKEN[name])
    with pytest.warns(UserWarning, match="is ignored"):
        call()
    assert tuple(launched[-1][1:]) == tiles("forward")[0][:2]
    fused_attn.autotune(*tensors(), backend="triton", timer=clock(2.0, 1.0, 3.0))
    tuning.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()  # written anew
    assert tuple(launched[-1][1:]) == tiles("forward")[1][:2]


def write(folder: Path, tile: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    machine = triton_device.machine(CPU)
    content = {"format": 1, "machine": machine._asdict(), "choices": [["forward", PLAIN, tile]]}
    (folder / machine.file_name()).write_text(json.dumps(content))


def test_a_tile_that_is_not_shipped_is_ignored_aloud(
    own_folder: Path, launched: list[tuple[str, int, int]]
) -> None:
    write(own_folder, [512, 512, 4, 9, 256])
    with pytest.warns(UserWarning, match="is no tile for forward"):
        call()
    assert tuple(launched[-1][1:]) == tiles("forward")[0][:2]
    tuning.forget()
    write(own_folder, ["64"])
    with pytest.warns(UserWarning, match="is no choice"):
        call()


def test_choices_may_be_shipped_and_the_users_win(
    own_folder: Path, launched: list[tuple[str, int, int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, second, third = tiles("forward")
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    write(tuning.SHIPPED, list(second))
    call()
    assert tuple(launched[-1][1:]) == second[:2]
    tuning.forget()
    write(own_folder, list(third))
    call()
    assert tuple(launched[-1][1:]) == third[:2]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "fused_attn").write_text("a file in its place")
    with pytest.warns(UserWarning, match="cannot be kept"):
        fused_attn.autotune(*tensors(), backend="triton", timer=clock(2.0, 1.0, 3.0))


def test_what_a_choice_holds_for_is_in_its_name() -> None:
    machine = triton_device.Machine("NVIDIA H200", 90, "3.7.1", "0123abcd")
    assert machine.file_name() == "NVIDIA-H200-sm90-triton3.7.1-0123abcd.json"
    changed = [machine._replace(gpu="NVIDIA B200"), machine._replace(triton="3.6.0"),
               machine._replace(kernels="ffff"), machine._replace(capability=100)]  # fmt: skip
    assert len({x.file_name() for x in (machine, *changed)}) == 5


def test_without_triton_there_is_nothing_to_choose() -> None:
    q = torch.randn(1, 1, 4, 8)
    assert fused_attn.autotune(q, q, q, backend="reference", timer=forbidden) == {}
    code = "import sys, fused_attn; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
