"""What the machine can do at best, measured in the same run: multiply-adds, GEMM, copying."""

from __future__ import annotations

import functools
import time

import torch

from fused_attn.runtime import native

from .timing import ROUNDS, DeviceClock, HostClock

# The ceilings of the roofline, by the name that results carry, in words.
CEILINGS = {
    "multiply-adds": "multiply-adds in registers (one core's arithmetic, times threads)",
    "GEMM": "GEMM (torch's product of large matrices)",
    "copy": "copy (torch's copy of a tensor larger than any cache)",
}
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**29}  # far more than any cache holds


@functools.cache
def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of one thread doing nothing but multiply-adds in the arithmetic of `dtype`.

    The best of a few measurements: a ceiling, not a typical speed.
    """
    multiply_adds, name = native.module().multiply_adds, str(dtype)[6:]
    repeats, rates = 1_000_000, []
    multiply_adds(name, repeats)
    for _ in range(ROUNDS):
        start = time.thread_time()
        operations = multiply_adds(name, repeats)
        rates.append(operations / (time.thread_time() - start))
    return max(rates)


@functools.cache
def gemm_flops(dtype: torch.dtype, device: str, threads: int) -> float:
    """FLOP/s of torch's product of two square matrices, the best of a few."""
    n = GEMM_SIZE[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b), device, threads)


@functools.cache
def copy_bandwidth(device: str, threads: int) -> float:
    """Bytes a second, read and written, of torch's copy of a tensor far larger than any cache."""
    x = torch.zeros(COPY_ELEMENTS[device], device=device)
    y = torch.zeros_like(x)
    return 2 * x.numel() * x.itemsize / _fastest(lambda: y.copy_(x), device, threads)


def _fastest(function: object, device: str, threads: int) -> float:
    clock = DeviceClock(9) if device == "cuda" else HostClock(threads, 5)
    times, failed = clock.time({"it": function})  # type: ignore[dict-item]
    for error in failed.values():
        raise error
    return times["it"].minimum


def ceiling(
    bound: str, dtype: torch.dtype, device: str, threads: int
) -> tuple[str, float] | tuple[None, None]:
    """Name and rate (FLOP/s or bytes/s) of what bounds a problem here; None if nothing does."""
    if bound == "memory":
        return "copy", copy_bandwidth(device, threads)
    if bound != "compute":
        return None, None
    if device == "cpu" and native.why_not() is None:
        return "multiply-adds", threads * peak_flops(dtype)
    return "GEMM", gemm_flops(dtype, device, threads)
