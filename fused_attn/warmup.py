"""Compiling ahead of the first call."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from . import triton_runtime
from .functional import attention


def warmup(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> dict[str, float]:
    """Compile the kernels of `attention(q, k, v, **arguments)`, so that the first call is quick.

    Runs nothing on the device. The backward is compiled too where q, k, v or a bias requires a
    gradient. Kernels go by dtypes, head sizes, strides' divisibility by 16 and which operands there
    are, not by lengths: one call of each kind is enough. What Triton compiled before is read from
    its cache on disk (TRITON_CACHE_DIR). Backends that compile nothing at run time have nothing to
    do here.

    Args:
        q, k, v, arguments: as for `attention`; the values do not matter.

    Returns:
        Seconds by kernel; empty if the backend that would run the call compiles nothing.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def record(name: str, compiled: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - last
        last = now

    with triton_runtime.compiling_for(None, record):
        result = attention(q, k, v, **arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = tuple(x for x in outputs if x.requires_grad)
        inputs = [x for x in (q, k, v, arguments.get("bias")) if x is not None and x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs])
    return seconds
