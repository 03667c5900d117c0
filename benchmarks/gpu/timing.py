"""Timing on the device: events around calls, everybody in turn, the second-level cache flushed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

ROUNDS = 25
WARMUP = 3
FLUSH_BYTES = 256 * 2**20  # more than any second-level cache


def milliseconds(
    sides: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, tuple[float, float, float]]:
    """(median, lower and upper quartile) of each side's time, one call of each in every round.

    A side that raises is left out: the caller says so.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {x: [] for x in sides}
    for function in sides.values():
        for _ in range(WARMUP):
            function()
    for _ in range(rounds):
        for name, function in sides.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    results = {}
    for name, pairs in events.items():
        low, median, high = statistics.quantiles([a.elapsed_time(b) for a, b in pairs], n=4)
        results[name] = (median, low, high)
    return results


def working(sides: Mapping[str, Callable[[], object]]) -> tuple[dict, dict[str, str]]:
    """Those of `sides` that can be called, and why the others cannot."""
    able, refused = {}, {}
    for name, function in sides.items():
        try:
            function()
            torch.cuda.synchronize()
            able[name] = function
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return able, refused
