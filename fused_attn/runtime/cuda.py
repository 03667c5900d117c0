"""What every CUDA C++ backend needs: the compiled kernels, or why there are none, and launching.

FUSED_ATTN_EMULATOR names the compiled emulator (`csrc/emulator`, for tests): the kernels then run
on CPU tensors, on an emulated device, and a backend is taken only when it is asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native


@functools.cache
def _emulator() -> ModuleType | None:
    path = os.environ.get("FUSED_ATTN_EMULATOR")
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("_emulator", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"FUSED_ATTN_EMULATOR={path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated() -> bool:
    """True if the kernels run on the emulator, on CPU tensors."""
    return _emulator() is not None


# The compiler cannot trace an import: see native.py.
emulated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def module() -> ModuleType:
    """The module that has the kernels' functions (`*_cuda`)."""
    emulator = _emulator()
    return native.module() if emulator is None else emulator


def why_not(
    device: torch.device,
    *,
    exactly: tuple[int, int] | None = None,
    at_least: tuple[int, int] | None = None,
) -> list[str]:
    """Reasons why no CUDA C++ kernel can run on tensors on `device`.

    Args:
        exactly, at_least: the compute capability that the kernels are made for.
    """
    if emulated():
        return [] if device.type == "cpu" else [f"is emulated on the CPU, tensors are on {device}"]
    if device.type != "cuda" or torch.version.hip:
        return [f"needs tensors on an NVIDIA GPU, these are on {device}"]
    missing = native.why_not()
    if missing is not None:
        return [missing]
    build = native.module().build_info()
    if not build["cuda"]:
        return [f"fused_attn._C was built without CUDA: {build['cuda_missing']}"]
    runtime, driver = native.module().cuda_versions()
    if driver // 1000 < runtime // 1000:
        return [
            f"needs a driver for CUDA {runtime // 1000}.0 or later, which fused_attn._C was built "
            f"with; this one is for {_version(driver)}"
        ]
    capability = torch.cuda.get_device_capability(device)
    have = ".".join(map(str, capability))
    if exactly is not None and capability != exactly:
        return [f"needs compute capability {exactly[0]}.{exactly[1]}, {device} has {have}"]
    if at_least is not None and capability < at_least:
        return [f"needs compute capability {at_least[0]}.{at_least[1]}, {device} has {have}"]
    archs = build["cuda_archs"].split()
    if not any(_runs_on(arch, capability, exactly is not None) for arch in archs):
        return [
            f"fused_attn._C was built for {', '.join(archs) or 'no GPU'} "
            f"(FUSED_ATTN_CUDA_ARCHS), {device} has compute capability {have}"
        ]
    return []


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _runs_on(arch: str, capability: tuple[int, int], exactly: bool) -> bool:
    """Whether code for `arch` ("80", "90a") runs: a letter binds it to one capability."""
    number = int(arch.rstrip("af"))
    major, minor = divmod(number, 10)
    if exactly or not arch.isdigit():
        return arch == f"{capability[0]}{capability[1]}a"
    return major == capability[0] and minor <= capability[1]


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(
    function: str, arguments: tuple[Any, ...], device: torch.device, problem: Callable[[], object]
) -> None:
    """Call `function` of the module with `arguments` and torch's current stream of `device`.

    Args:
        problem: describes the call, for the message.

    Raises:
        RuntimeError: a launch failed; with CUDA's name for the error, and the problem.
    """
    with on(device):
        try:
            getattr(module(), function)(*arguments, stream(device))
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n  in {problem()}") from None


def stream(device: torch.device) -> int:
    """Handle of torch's current stream of `device`."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def for_tiles(tensor: Tensor) -> Tensor:
    """`tensor` as the copy engine can read it: rows contiguous, 16-byte aligned, no broadcast.

    Most tensors are; others are copied, with rows padded to a multiple of 8 elements.
    """
    strides = tensor.stride()
    sizes = tensor.shape
    if (
        tensor.data_ptr() % 16 == 0
        and (strides[-1] == 1 or sizes[-1] == 1)
        and all(
            s % 8 == 0 and s > 0 for s, n in zip(strides[:-1], sizes[:-1], strict=True) if n > 1
        )
    ):
        return tensor
    padded = torch.empty(
        (*sizes[:-1], -(-sizes[-1] // 8) * 8), dtype=tensor.dtype, device=tensor.device
    )
    copy = padded[..., : sizes[-1]]
    copy.copy_(tensor)
    return copy
