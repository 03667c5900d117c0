"""What every CUDA C++ backend needs: the compiled kernels, or why there are none, and launching.

FUSED_ATTN_EMULATOR names the compiled emulator (`csrc/emulator`, for tests): the kernels then run
on CPU tensors, on an emulated device, and a backend is taken only when it is asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import ModuleType

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
        return ["fused_attn._C was built without CUDA (FUSED_ATTN_CUDA=on says why)"]
    capability = torch.cuda.get_device_capability(device)
    have = ".".join(map(str, capability))
    if exactly is not None and capability != exactly:
        return [f"needs compute capability {exactly[0]}.{exactly[1]}, {device} has {have}"]
    if at_least is not None and capability < at_least:
        return [f"needs compute capability {at_least[0]}.{at_least[1]}, {device} has {have}"]
    return []


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


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
