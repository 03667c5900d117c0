"""How fast a backend is beside torch's own functions: both in one process, by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..ops import dispatch
from ..ops.operations import OPERATIONS
from . import calls
from .calls import Call
from .memory import Skipped

SECONDS = 0.25  # for one figure
LEAST_ROUNDS = 3

ATTENTION = {"cpu": (1, 4, 4, 256, 256), "cuda": (4, 16, 16, 2048, 2048)}
ROWS = {"cpu": 512, "cuda": 8192}


def ratio(operation: str, dtype: str, size: int, backend: str, device: str) -> float:
    """torch's seconds over ours, the smaller of inference and training: below 1, torch is faster.

    Raises:
        Skipped: torch has nothing that runs the call.
    """
    [torchs] = [b for each in OPERATIONS if each.name == operation for b in each.backends
                if dispatch.is_torchs(b)]  # fmt: skip
    call = _call(operation, dtype, size, device.partition(":")[0]).to(device)
    ratios = []
    for training in (False, True):
        try:
            ours, theirs = by_turns(
                lambda t=training: _once(call, backend, t),  # type: ignore[misc]
                lambda t=training: _once(call, torchs.NAME, t),  # type: ignore[misc]
                device,
            )
        except dispatch.UnsupportedError as error:
            raise Skipped(str(error).splitlines()[-1].strip()) from None
        ratios.append(theirs / ours)
    return min(ratios)


def _call(operation: str, dtype: str, size: int, kind: str) -> Call:
    rows = ROWS[kind]
    if operation == "attention":
        return calls.attention(dtype, size, ATTENTION[kind], {"causal": True, "lse": False})
    if operation == "layer_norm":
        return calls.layer_norm(dtype, rows, 1024, False)
    if operation == "bias_activation":
        return calls.bias_activation(dtype, rows, 4096, "gelu", False)
    if operation == "linear":
        return calls.linear(dtype, 16 if size else rows, 512, 2048)
    return calls.embedding(dtype, rows // 4, 1000, 512)


def _once(call: Call, backend: str, training: bool) -> None:
    if training:
        call.results(backend)
        return
    with torch.no_grad():
        call.run(backend, call.tensors)


def by_turns(
    ours: Callable[[], None], theirs: Callable[[], None], device: str, seconds: float = SECONDS
) -> tuple[float, float]:
    """Seconds that either takes, after two rounds that do not count.

    Medians on a GPU; on a CPU the least, which hardly knows who else is at work.
    """
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS + 2 or time.perf_counter() < end:
        for run, found in zip((ours, theirs), times, strict=True):
            found.append(_seconds(run, device))
        rounds += 1
    figure = statistics.median if device.startswith("cuda") else min
    return figure(times[0][2:]), figure(times[1][2:])


def _seconds(run: Callable[[], None], device: str) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
