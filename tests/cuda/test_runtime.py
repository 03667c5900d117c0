"""What the launchers ask of the CUDA runtime, on a made-up one: `csrc/emulator/runtime.cpp`.

It refuses what a GPU's refuses: more shared memory than a kernel was allowed, tensor maps encoded
by a thread without a context or against the driver's rules, grids out of range.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn import attention, layer_norm
from fused_attn.runtime import cuda as cuda_runtime

pytestmark = pytest.mark.skipif(
    not cuda_runtime.emulated(), reason="the emulator is not built (make test builds it)"
)
CSRC = Path(__file__).parents[2] / "csrc"
KIB = 1024
ATTRIBUTE = "cudaFuncSetAttribute"
LAUNCH = "cudaLaunchKernelExC"

_devices = itertools.count(1)
_lengths = itertools.count(17)


@pytest.fixture
def runtime() -> Iterator[Any]:
    """The runtime, with a device current on which nothing has run yet."""
    module = cuda_runtime.module()
    module.reset_runtime(100)
    assert module.set_device(next(_devices)) == 0
    yield module
    module.reset_runtime()


def new_attention() -> torch.Tensor:
    """A call whose tensor maps are not known yet."""
    x = torch.randn(1, 1, next(_lengths), 64).half()
    return attention(x, x, x, backend="cuda")


def on_a_cold_thread(function: Any) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_norm_backward_runs_at_growing_widths(runtime: Any) -> None:
    """Its shared memory grows with the width; the first call must not set the limit for all."""
    for width in (256, 768, 1024, 512):
        x = torch.randn(5, width, requires_grad=True)
        weight = torch.randn(width, requires_grad=True)
        found = torch.autograd.grad(
            layer_norm(x, (width,), weight, backend="cuda").square().sum(), (x, weight)
        )
        expected = torch.autograd.grad(
            torch.nn.functional.layer_norm(x, (width,), weight).square().sum(), (x, weight)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ATTRIBUTE not in runtime.runtime_calls()


def test_shared_memory_is_asked_for_above_48_kib_and_never_lowered(runtime: Any) -> None:
    asked = []
    for kib in (0, 48, 49, 100, 60, 100, 227, 48):
        runtime.launch_nothing(1, 32, kib * KIB)
        asked.append(runtime.runtime_calls().get(ATTRIBUTE, 0))
    assert asked == [0, 0, 1, 2, 2, 2, 3, 3]


def test_each_device_has_its_own_limits(runtime: Any) -> None:
    for count in (1, 2):
        runtime.launch_nothing(1, 32, 100 * KIB)
        assert runtime.runtime_calls()[ATTRIBUTE] == count
        assert runtime.set_device(next(_devices)) == 0


def test_more_shared_memory_than_there_is_fails_and_is_not_remembered(runtime: Any) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cudaFuncSetAttribute.*cudaErrorInvalidValue"):
            runtime.launch_nothing(1, 32, 228 * KIB)
        assert runtime.last_error() == 0
    runtime.launch_nothing(1, 32, 227 * KIB)


def test_the_first_call_of_a_thread_has_a_context_for_its_maps(runtime: Any) -> None:
    def call() -> tuple[int, int, torch.Tensor]:
        before = runtime.bound_device()
        return before, runtime.bound_device(), new_attention()

    before, _, out = on_a_cold_thread(call)
    assert before == -1
    assert out.isfinite().all()


def test_maps_are_encoded_for_the_current_device(runtime: Any) -> None:
    device = next(_devices)

    def call() -> int:
        runtime.set_device(device)
        new_attention()
        return runtime.bound_device()

    assert on_a_cold_thread(call) == device


@pytest.mark.parametrize("function", ["cudaGetDevice", "cudaSetDevice", ATTRIBUTE, LAUNCH])
def test_each_error_is_told_and_leaves_nothing_behind(runtime: Any, function: str) -> None:
    runtime.fail_next_call(function, 46, "cudaErrorDevicesUnavailable")
    with pytest.raises(RuntimeError, match="failed: cudaErrorDevicesUnavailable"):
        new_attention()
    assert runtime.last_error() == 0
    assert new_attention().isfinite().all()


def test_a_grid_has_its_limits(runtime: Any) -> None:
    with pytest.raises(
        RuntimeError, match="nothing needs 2147483648 blocks, a grid has 2147483647"
    ):
        runtime.launch_nothing(2**31, 32, 0)
    for blocks, threads in ((0, 32), (1, 0), (1, 1056)):
        with pytest.raises(RuntimeError, match="nothing failed: cudaErrorInvalidConfiguration"):
            runtime.launch_nothing(blocks, threads, 0)
    assert runtime.last_error() == 0


GOOD_MAP = {
    "rank": 5, "address": 64, "size": [64, 100, 1, 2, 3], "stride": [128, 12800, 12800, 25600],
    "box": [64, 128, 1, 1, 1], "step": [1, 1, 1, 1, 1],
}  # fmt: skip


def changed(name: str, index: int, value: int) -> dict[str, Any]:
    values = list(GOOD_MAP[name])
    values[index] = value
    return {name: values}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        (changed("size", 3, 2**32), ""),
        (changed("size", 1, 2**32 + 1), "size in dimension 1"),
        (changed("size", 4, 0), "size in dimension 4"),
        (changed("box", 1, 256), ""),
        (changed("box", 1, 257), "box in dimension 1"),
        (changed("box", 2, 0), "box in dimension 2"),
        (changed("stride", 3, 2**40 - 16), ""),
        (changed("stride", 3, 2**40), "stride in dimension 4"),
        (changed("stride", 0, 136), "stride in dimension 1"),
        (changed("stride", 1, 0), "stride in dimension 2"),
        (changed("step", 1, 9), "element stride in dimension 1"),
        (changed("step", 1, 0), "element stride in dimension 1"),
        ({"address": 72}, "address"),
        ({"rank": 6}, "rank 6"),
        ({"rank": 0}, "rank 0"),
        ({"swizzle": 2}, "swizzle of box rows of 128 bytes"),
        ({"swizzle": 2, **changed("box", 0, 32)}, ""),
        ({"swizzle": 0, **changed("box", 0, 128)}, ""),
        (changed("box", 0, 60), "box rows of 120 bytes"),
        (changed("box", 0, 72), "swizzle of box rows of 144 bytes"),
        ({"rank": 2, "interleave": 1}, "interleave of rank 2"),
        ({"interleave": 2, "swizzle": 3}, "interleave without its swizzle"),
        ({"interleave": 2, "swizzle": 1, "address": 80}, "address"),
    ],
)  # fmt: skip
def test_the_encoder_has_the_rules_of_the_driver(change: dict[str, Any], reason: str) -> None:
    found = cuda_runtime.module().encoder_refuses(**(GOOD_MAP | change))
    assert found.startswith(reason), found
    assert bool(found) == bool(reason)


def compiles(source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", *flags, f"-I{CSRC}", str(CSRC / source)],
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("version", [12030, 12040, 12050, 13000])
def test_the_launcher_compiles_with_every_toolkit_that_the_build_accepts(version: int) -> None:
    result = compiles(
        "cuda/launch.cpp", f"-DCUDART_VERSION={version}", f"-I{CSRC}/emulator/toolkit"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", ["emulator/runtime.cpp", "emulator/encoder.cpp"])
def test_the_runtime_has_the_signatures_of_a_toolkit(source: str) -> None:
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders.append(Path("/usr/local/cuda"))
    include = next((x / "include" for x in folders if (x / "include/cuda_runtime.h").exists()), "")
    if not include:
        pytest.skip("there is no CUDA toolkit to compare with")
    result = compiles(source, f"-I{include}")
    assert result.returncode == 0, result.stderr
