"""How everything is timed: all sides in one process, turn by turn, medians with their spread.

Machines are shared. One thread of CPU time (`time.thread_time`) hardly notices neighbours; wall
time over several threads does, and so has its minimum as well. Ratios come from samples taken in
turn, so that a slow minute hits all sides.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

MIN_SAMPLE_SECONDS = 0.02
ROUNDS = 9
PROCESS_ROUNDS = 6  # of fresh processes, which take seconds
DEVICE_ROUNDS = 25
WARMUP = 3
FLUSH_BYTES = 256 * 2**20  # more than any second-level cache

Steps = Mapping[str, Callable[[], object]]  # what is timed, by side


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the samples, smallest, largest, and the quartiles."""

    median: float
    minimum: float
    low: float
    high: float
    maximum: float
    values: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        two = samples if len(samples) > 1 else [*samples, *samples]
        low, median, high = statistics.quantiles(two, n=4, method="inclusive")
        return cls(median, min(samples), low, high, max(samples), tuple(samples))

    def __add__(self, other: Timing) -> Timing:
        return Timing.of([*self.values, *other.values])

    @property
    def samples(self) -> int:
        return len(self.values)


class Clock(Protocol):
    """A way to time: its name for tables, how many threads it measures, and samples of one side."""

    name: str
    threads: int
    rounds: int

    def time(self, steps: Steps) -> tuple[dict[str, Timing], dict[str, Exception]]:
        """Seconds of every side, and the exceptions of those that raised."""
        ...

    def figure(self, timing: Timing) -> float:
        """The number that stands for all samples."""
        ...


class _InTurn:
    """One sample of each side in every round; a side that raises is out."""

    def __init__(self, name: str, threads: int, rounds: int) -> None:
        self.name, self.threads, self.rounds = name, threads, rounds

    def ready(self, function: Callable[[], object]) -> Callable[[], Any]:
        """Warm `function` up; the result takes one sample of it."""
        raise NotImplementedError

    def seconds(self, sample: Any) -> float:
        """Seconds a call of a sample, asked for when all have been taken."""
        return float(sample)

    def figure(self, timing: Timing) -> float:
        """The number that stands for all samples."""
        return timing.median

    def time(self, steps: Steps) -> tuple[dict[str, Timing], dict[str, Exception]]:
        failed: dict[str, Exception] = {}
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            samplers = {}
            for name, function in steps.items():
                try:
                    samplers[name] = self.ready(function)
                except Exception as error:
                    failed[name] = error
            samples: dict[str, list[Any]] = {name: [] for name in samplers}
            for _ in range(self.rounds):
                for name, sample in samplers.items():
                    samples[name].append(sample())
            times = {
                name: Timing.of([self.seconds(sample) for sample in taken])
                for name, taken in samples.items()
            }
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
        return times, failed


class HostClock(_InTurn):
    """CPU time of this thread, if one thread computes; wall time over several threads."""

    def __init__(self, threads: int = 1, rounds: int = ROUNDS) -> None:
        name = "CPU time, 1 thread" if threads == 1 else f"wall time, {threads} threads"
        super().__init__(name, threads, rounds)
        self.now = time.thread_time if threads == 1 else time.perf_counter

    def figure(self, timing: Timing) -> float:
        # Wall times of several threads on a shared machine are only worth their minimum.
        return timing.median if self.threads == 1 else timing.minimum

    def ready(self, function: Callable[[], object]) -> Callable[[], float]:
        repeats = self._repeats(function)

        def sample() -> float:
            start = self.now()
            for _ in range(repeats):
                function()
            return (self.now() - start) / repeats

        return sample

    def _repeats(self, function: Callable[[], object]) -> int:
        """How often to call `function` in a sample; warms it up on the way."""
        function()
        start, count = self.now(), 0
        while self.now() - start < MIN_SAMPLE_SECONDS:
            function()
            count += 1
        return max(1, count)


class LaunchClock(HostClock):
    """Wall time of a row of calls on a GPU, until the device is done: what a tiny call costs."""

    CALLS = 200

    def __init__(self, rounds: int = ROUNDS) -> None:
        super().__init__(1, rounds)
        self.name = "wall time a call"

    def figure(self, timing: Timing) -> float:
        return timing.median

    def ready(self, function: Callable[[], object]) -> Callable[[], float]:
        for _ in range(WARMUP):
            function()

        def sample() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.CALLS):
                function()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / self.CALLS

        return sample


class ReportedClock(_InTurn):
    """Functions that return their own seconds (fresh processes do)."""

    def __init__(self, rounds: int = PROCESS_ROUNDS) -> None:
        super().__init__("wall time", torch.get_num_threads(), rounds)

    def ready(self, function: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            value = function()
            assert isinstance(value, float)
            return value

        sample()
        return sample


class DeviceClock(_InTurn):
    """Events on the device around one call, the second-level cache flushed before.

    Nobody waits for the device between samples: the queue hides what launching costs.
    """

    CALLS = 1

    def __init__(self, rounds: int = DEVICE_ROUNDS) -> None:
        super().__init__("device events", torch.get_num_threads(), rounds)

    def ready(self, function: Callable[[], object]) -> Callable[[], Any]:
        for _ in range(WARMUP):
            function()
        torch.cuda.synchronize()
        return functools.partial(self._sample, function)

    def _sample(self, function: Callable[[], object]) -> Any:
        _flush_buffer().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.CALLS):
            function()
        end.record()
        return start, end

    def seconds(self, sample: Any) -> float:
        start, end = sample
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.CALLS


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


class GraphClock(DeviceClock):
    """Replays of a CUDA graph of the call: device work alone, without anybody's launch cost."""

    CALLS = 20

    def __init__(self, rounds: int = DEVICE_ROUNDS) -> None:
        super().__init__(rounds)
        self.name = "CUDA graph"

    def ready(self, function: Callable[[], object]) -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return functools.partial(self._sample, graph.replay)
