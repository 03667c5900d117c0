"""Peak memory of a call: of torch's allocator on a GPU, of the whole process on the CPU.

On the CPU torch's own accounting would miss what kernels and other libraries allocate. So the heap
is trimmed, the kernel's high-water mark is reset, and its growth over one call counts: every page
that the call touched beyond what was there, results and scratch alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
RESET_HIGH_WATER_MARK = "5"  # proc(5), clear_refs
HOW = {"cuda": "allocator's peak", "cpu": "growth of the process's peak"}


def why_not(device: str) -> str | None:
    """Why peak memory cannot be measured here; None if it can."""
    if device == "cuda":
        return None
    try:
        (PROCESS / "clear_refs").write_text(RESET_HIGH_WATER_MARK)
        ctypes.CDLL(None).malloc_trim  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"needs Linux with glibc ({error})"
    return None


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Bytes beyond those held before that one call of `function` needs at its worst moment."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text(RESET_HIGH_WATER_MARK)
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{PROCESS / 'status'} has no {field}")
