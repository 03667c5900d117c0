"""When a call is repeated from what was noted of it (`runtime/triton/replay.py`), and when not.

`python -m tests.cases.replay_rules` prints a JSON object: for each rule what broke it, or "".
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import traceback
import weakref
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks import fake_gpu
from fused_attn.runtime.triton import device as triton_device
from fused_attn.runtime.triton import replay, tuning
from tests.cases.replayed_launches import (
    Compiled,
    attention,
    half,
    launches,
    nothing_compiled,
)

RULES: list[Callable[[fake_gpu.FakeGpu], None]] = []


def rule(check: Callable[[fake_gpu.FakeGpu], None]) -> Callable[[fake_gpu.FakeGpu], None]:
    RULES.append(check)
    return check


def repeats(run: Callable[[], None]) -> bool:
    """Whether a call is run from its notes, to the end."""
    done = []
    original = replay.Tape.run

    def watch(self, *args) -> bool:
        done.append(original(self, *args))
        return done[-1]

    with mock.patch.object(replay.Tape, "run", watch):
        run()
    return done == [True]


def known(run: Callable[[], None]) -> Callable[[], None]:
    """A call of which there are notes."""
    run()
    run()
    assert repeats(run), "the third call was not repeated"
    return run


def call(backward: bool = True, dtype: torch.dtype = torch.float16) -> Callable[[], None]:
    return attention(*(half(1, 2, 40, 64, dtype=dtype) for _ in "qkv"), backward)[0]


@rule
def launch_hooks_see_every_launch(gpu: fake_gpu.FakeGpu) -> None:
    from triton import knobs

    run, seen = known(call()), []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        seen.clear()
        chain.add(seen.append)
        try:
            assert not repeats(run)
        finally:
            chain.remove(seen.append)
        assert [each["name"] for each in seen] == [k.src.fn.__name__ for k, _ in launches(run)]
    assert repeats(run)
    with mock.patch.object(knobs.runtime, "launch_enter_hook", seen.append):
        assert not repeats(run)  # a hook of the user's own, in no chain
    with mock.patch.object(knobs.runtime, "launch_enter_hook", None):
        assert repeats(run)


@rule
def hooks_of_a_kernel_see_its_tensors(gpu: fake_gpu.FakeGpu) -> None:
    from fused_attn.ops.attention.triton.forward import _attention_forward_kernel as kernel

    run, seen = known(call(backward=False)), []
    kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    try:
        assert not repeats(run)
        assert len(seen) == 1
    finally:
        kernel.pre_run_hooks.clear()
    assert repeats(run)


@rule
def debugging_compiles_other_kernels(gpu: fake_gpu.FakeGpu) -> None:
    from triton import knobs

    run, made = known(call()), Compiled.made
    with mock.patch.object(knobs.runtime, "debug", True):
        assert not repeats(run)
        assert Compiled.made > made
    assert repeats(run)
    stages = mock.patch.object(knobs.runtime, "add_stages_inspection_hook", return_value=("k", "x"))
    instrumented = mock.patch.object(knobs.compilation, "instrumentation_mode", "fpsan")
    for changed in (stages, instrumented):
        with changed:
            assert not repeats(run)
    assert repeats(run)


@rule
def trials_and_their_end_start_anew(gpu: fake_gpu.FakeGpu) -> None:
    run = known(call())
    with tuning.trying(lambda launch: 1.0, again=False):
        assert not repeats(run)
    assert not repeats(run)
    known(run)
    tuning.forget()
    assert not repeats(run)


@rule
def a_tile_that_has_just_been_chosen_is_not_noted(gpu: fake_gpu.FakeGpu) -> None:
    run = call()
    run()
    tuning._chosen.clear()
    run()  # noted, and refused
    assert not repeats(run), "what follows is the call that is noted"
    assert repeats(run)


@rule
def an_unknown_triton_is_left_alone(gpu: fake_gpu.FakeGpu) -> None:
    run = call()
    replay._is_known.cache_clear()
    with mock.patch.object(replay, "KNOWN_VERSIONS", ((3, 5),)):
        for _ in range(4):
            assert not repeats(run)
    replay._is_known.cache_clear()


@rule
def compiling_without_launching_launches_nothing(gpu: fake_gpu.FakeGpu) -> None:
    run, wanted = known(call()), []
    with triton_device.compiling_for(90, wanted.append):
        assert not launches(run)
    assert len(wanted) == len(launches(run))


@rule
def notes_keep_no_tensor(gpu: fake_gpu.FakeGpu) -> None:
    run, given = attention(*(half(1, 2, 40, 64) for _ in "qkv"), True)
    known(run)
    references = [weakref.ref(x.untyped_storage()) for x in given] + [weakref.ref(x) for x in given]
    del run, given
    gc.collect()
    assert not [1 for reference in references if reference() is not None]


@rule
def streams_devices_and_drivers_are_those_of_the_call(gpu: fake_gpu.FakeGpu) -> None:
    from triton.runtime import driver

    run = known(call())
    gpu.stream = 4711
    assert repeats(run)
    assert {launch.stream for _, launch in launches(run)} == {4711}
    gpu.stream = 0
    gpu.device = 1
    assert not repeats(run)
    gpu.device = 0
    assert repeats(run)
    driver.set_active(copy.copy(gpu))
    assert not repeats(run)
    driver.set_active(gpu)
    assert repeats(run)


@rule
def a_setting_of_torch_is_another_call(gpu: fake_gpu.FakeGpu) -> None:
    run = known(call(dtype=torch.float32))
    kernels = [kernel.function for kernel, _ in launches(run)]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if before != "ieee" else "tf32"
    try:
        assert not repeats(run)
        assert [kernel.function for kernel, _ in launches(run)] != kernels
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@rule
def what_cannot_be_told_is_never_repeated(gpu: fake_gpu.FakeGpu) -> None:
    elsewhere = torch.zeros(8)

    def reads_a_value(tensors: replay.Tensors) -> None:
        tensors[0].add_(tensors[0].sum().item())

    def reads_another_tensor(tensors: replay.Tensors) -> None:
        tensors[0].add_(elsewhere)

    def finds_some(tensors: replay.Tensors) -> None:
        tensors[0].add_(tensors[0].nonzero().sum())

    for function in (reads_a_value, reads_another_tensor, finds_some):
        for _ in range(4):
            assert not repeats(functools.partial(replay.run, function, (torch.ones(8),)))


@rule
def operators_between_are_repeated(gpu: fake_gpu.FakeGpu) -> None:
    def function(tensors: replay.Tensors, add: float) -> None:
        x, y = tensors
        y[1:].copy_(x.view(2, 4)[:, 1:].sum(0) + add)
        y[0].fill_(torch.empty_like(x).fill_(add).sum())

    def result(x: Tensor, add: float) -> list[float]:
        y = torch.empty(4)
        replay.run(function, (x, y), add)
        return y.tolist()

    for seed in range(5):
        x = torch.arange(8.0) + seed
        sums = (x[1:4] + x[5:8] + 2.5).tolist()
        assert result(x, 2.5) == [20.0, *sums], seed
    assert repeats(lambda: result(torch.ones(8), 2.5) and None)
    assert result(torch.ones(8), 1.0) == [8.0, 3.0, 3.0, 3.0]


@rule
def layouts_tell_calls_apart_with_and_without_compiled_code(gpu: fake_gpu.FakeGpu) -> None:
    base = torch.zeros(65, dtype=torch.float16)
    kinds = [
        (base[:64].view(8, 8),), (base[1:].view(8, 8),), (base[2:].view(7, 9),),
        (base[:64].view(8, 8).T,), (base[:64].view(4, 16),), (base[:64].view(8, 8), None),
        (base[:64].view(8, 8).view(torch.bfloat16),), (base[:0].view(0, 8),), (None,),
        (torch.zeros(8, 8),), (torch.zeros(8, 8, dtype=torch.bool),),
    ]  # fmt: skip
    for launch_key in (replay._launch_key(), replay._launch_key_in_python):
        keys = {launch_key(tensors)[0] for tensors in kinds}
        assert len(keys) == len(kinds)
        for tensors in kinds:
            key, starts = launch_key(tensors)
            assert key == launch_key(tensors)[0]
            there = [x is not None and x.numel() > 0 for x in tensors]
            expected = [x.data_ptr() if t else 0 for x, t in zip(tensors, there, strict=True)]
            assert list(starts) == expected
        moved = torch.zeros(80, dtype=torch.float16)[16:].view(8, 8)
        assert launch_key((moved,))[0] == launch_key(kinds[0])[0]


@rule
def a_repeated_launch_asks_the_driver_nothing_else(gpu: fake_gpu.FakeGpu) -> None:
    for length in (40, 1024):  # by descriptors, whose tensor maps are kept by address
        run, _ = attention(*(half(1, 2, length, 64) for _ in "qkv"))
        before = gpu.questions()
        known(run)
        assert gpu.questions() > before
        before = gpu.questions()
        assert repeats(run)
        assert gpu.questions() == before
    with mock.patch("fused_attn.runtime.triton.handle._MAX_MAPS", 2):
        for _ in range(5):
            run, given = attention(*(half(1, 2, 1024, 64) for _ in "qkv"))
            assert repeats(run)
            [(kernel, launch)] = launches(run)
            maps = [value for kind, value in kernel.values(launch.parameters) if kind == "map"]
            addresses = [int.from_bytes(each[:8], "little") for each in maps]
            assert addresses == [x.data_ptr() for x in given[:3]]


@rule
def tapes_are_bounded(gpu: fake_gpu.FakeGpu) -> None:
    with mock.patch.object(replay, "MAX_TAPES", 3):
        for length in range(1, 9):
            attention(*(half(1, 1, length, 16) for _ in "qkv"))[0]()
            assert len(replay._tapes) <= 3


def broken(check: Callable[[fake_gpu.FakeGpu], None], gpu: fake_gpu.FakeGpu) -> str:
    replay.forget()
    try:
        check(gpu)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    with nothing_compiled() as gpu:
        print(json.dumps({check.__name__: broken(check, gpu) for check in RULES}))
