"""Measuring one problem: every side judged, then the right ones timed in turn."""

from __future__ import annotations

import dataclasses
import functools
import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import memory
from .ceilings import ceiling
from .judge import Judge, first_line
from .peers.peer import Peer
from .problem import (
    ABSENT,
    FAILED,
    OK,
    SHORT_NAMES,
    WRONG,
    Prepared,
    Problem,
    Side,
    step,
    with_flags,
)
from .suites import Suite
from .timing import (
    DEVICE_ROUNDS,
    PROCESS_ROUNDS,
    ROUNDS,
    Clock,
    DeviceClock,
    GraphClock,
    HostClock,
    LaunchClock,
    ReportedClock,
    Steps,
    Timing,
)

SMALL_FLOPS = 2e10  # below, a GPU's time is launches as much as work: a CUDA graph tells them apart
SLOW_TO_COMPILE = "compiles for seconds; measured if asked for by name"


@dataclass(frozen=True)
class Again:
    """Times of a later pass, by clock and side, and what became of sides that have none now."""

    times: dict[str, dict[str, Timing]]
    faults: dict[str, str]


@dataclass
class Result:
    """One case: its sides, and the times of those that count."""

    suite: str
    problem: Problem
    sides: list[Side]
    times: dict[str, dict[str, Timing]] = field(default_factory=dict)  # by clock, by side
    clocks: dict[str, Clock] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def figure(self, clock: str, side: str) -> float:
        """The seconds of a side that count."""
        return self.clocks[clock].figure(self.times[clock][side])

    def timed(self) -> dict[str, list[str]]:
        """The sides that have times, by clock."""
        return {clock: list(times) for clock, times in self.times.items() if times}

    def add(self, again: Again) -> None:
        """Put the samples of a later pass beside those that are here."""
        for clock, times in again.times.items():
            for name, time in times.items():
                self.times[clock][name] += time
        for side in self.sides:
            side.status = again.faults.get(side.name, side.status)
        self.drop_faulty()

    def drop_faulty(self) -> None:
        """A side that fails has no figure at all: what an earlier clock or pass said is void."""
        faulty = [side.name for side in self.sides if side.status != OK]
        for times in self.times.values():
            for name in faulty:
                times.pop(name, None)

    def rows(self) -> list[dict[str, object]]:
        """A row a side and clock; one row without a clock for a side without a figure."""
        rows = []
        for side in self.sides:
            timed = [name for name, times in self.times.items() if side.name in times]
            rows += [self._row(side, name) for name in timed] or [self._row(side, None)]
        return rows

    def _row(self, side: Side, clock: str | None) -> dict[str, object]:
        problem = self.problem
        row: dict[str, object] = {
            "suite": self.suite, "case": problem.label, "operation": problem.operation,
            "direction": problem.direction, "dtype": SHORT_NAMES[problem.dtype],
            "device": problem.device, **problem.columns(), "side": side.name,
            "ours": "yes" if side.ours else "no", "status": side.status,
        }  # fmt: skip
        if clock is None:
            return row
        time = self.times[clock][side.name]
        row |= {"clock": clock, "samples": time.samples}
        row |= {name: f"{value:.4g}" for name, value in _quantiles(time).items()}
        row |= _rates(problem, self.figure(clock, side.name), self.clocks[clock].threads)
        if side.name in self.memory:
            row |= {"memory_bytes": self.memory[side.name], "memory_is": memory.HOW[problem.device]}
        return row


def _quantiles(time: Timing) -> dict[str, float]:
    return {
        "min_s": time.minimum, "q25_s": time.low, "median_s": time.median, "q75_s": time.high,
        "max_s": time.maximum,
    }  # fmt: skip


def _rates(problem: Problem, seconds: float, threads: int) -> dict[str, object]:
    row: dict[str, object] = {}
    rates = {"compute": problem.flops / seconds, "memory": problem.bytes / seconds}
    if problem.flops:
        row |= {"flops": f"{problem.flops:.6g}", "gflops": f"{rates['compute'] / 1e9:.4g}"}
    if problem.bytes:
        row |= {"bytes": f"{problem.bytes:.6g}", "gbytes": f"{rates['memory'] / 1e9:.4g}"}
    name, rate = ceiling(problem.bound, problem.dtype, problem.device, threads)
    if name is not None and rate is not None:
        row |= {"ceiling": name, "ceiling_rate": f"{rate / 1e9:.4g}"}
        row["share"] = f"{rates[problem.bound] / rate:.3f}"
    return row


@dataclass(frozen=True)
class Wanted:
    """What of the sides is asked for.

    Attributes:
        peers: names; all that are here if None.
        backends: names of our own, as in `BACKENDS`; all that can run if None.
        quick: leave out peers that compile for seconds on the CPU, unless they are named.
        rounds: samples a side, of all passes together; the clock's own number if None.
        passes: how often the case will be measured, see `passes.py`.
        threads: numbers of threads on the CPU, a clock each; 1 and torch's if None.
    """

    peers: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    quick: bool = False
    rounds: int | None = None
    passes: int = 1
    threads: tuple[int, ...] | None = None


def sides_of(
    problem: Problem, tensors: dict[str, Tensor], peers: Sequence[Peer], wanted: Wanted
) -> list[Side]:
    """Our sides and the peers of the problem's operation, those that cannot run it refused."""
    sides = []
    for side in problem.ours(tensors):
        backend = side.name.partition(":")[2]
        named = wanted.backends is not None and backend in wanted.backends
        if wanted.backends is not None and backend and not named:
            continue
        side.refuse(named)
        sides.append(side)
    for peer in peers:
        named = wanted.peers is not None and peer.name in wanted.peers
        if peer.serves(problem.operation) and (wanted.peers is None or named):
            sides.append(_peer_side(peer, problem, wanted, named))
    return sides


def _peer_side(peer: Peer, problem: Problem, wanted: Wanted, named: bool) -> Side:
    side = Side(peer.name, functools.partial(peer.prepare, problem), ours=False)
    absent = peer.missing()
    if absent is not None:
        side.status = f"{ABSENT}: {absent}"
        return side
    side.reasons = peer.why_not(problem)
    if peer.compiles and wanted.quick and problem.device == "cpu":
        side.by_name = SLOW_TO_COMPILE
    side.refuse(named)
    return side


def measure(
    suite: Suite, problem: Problem, peers: Sequence[Peer], wanted: Wanted | None = None
) -> Result:
    """Judge every side of `problem`, time those that are right, and measure their memory."""
    wanted = wanted or Wanted()
    with torch.set_grad_enabled(problem.wants_gradient), warnings.catch_warnings():
        # torch warns of every path that it does not take, and of prototypes on its fast path.
        warnings.simplefilter("ignore", UserWarning)
        judge = Judge(problem)
        checked = judge.problem
        candidates = {side.name: side for side in sides_of(checked, judge.tensors, peers, wanted)}
        for side in candidates.values():
            _judge(judge, side)
        tensors = judge.tensors
        if problem != checked:
            tensors = with_flags(problem, problem.tensors())
        sides = sides_of(problem, tensors, peers, wanted)
        for side in sides:
            if side.status == OK and candidates[side.name].status != OK:
                side.status = candidates[side.name].status
        result = Result(suite.name, problem, sides)
        steps = _time(result, tensors, clocks(suite, problem, wanted))
        _measure_memory(result, steps)
    gc.collect()
    return result


def time_again(
    suite: Suite,
    problem: Problem,
    names: Mapping[str, Sequence[str]],
    peers: Sequence[Peer],
    wanted: Wanted | None = None,
) -> Again:
    """Time sides, `names` by clock, that were right in an earlier pass, for `Result.add`."""
    wanted = wanted or Wanted()
    with torch.set_grad_enabled(problem.wants_gradient), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensors = with_flags(problem, problem.tensors())
        chosen = {name for sides in names.values() for name in sides}
        sides = [s for s in sides_of(problem, tensors, peers, wanted) if s.name in chosen]
        result = Result(suite.name, problem, sides)
        if sides:
            _time(result, tensors, clocks(suite, problem, wanted), names)
    gc.collect()
    return Again(result.times, {s.name: s.status for s in result.sides if s.status != OK})


def broken(suite: Suite, problem: Problem, error: Exception) -> Result:
    """The result of a case that could not be set up: nobody has a figure."""

    def prepare(tensors: dict[str, Tensor]) -> Prepared:
        raise error

    status = f"{FAILED}: the case itself: {first_line(error)}"
    side = Side("fused_attn", prepare, status=status)
    return Result(suite.name, problem, [side])


def _judge(judge: Judge, side: Side) -> None:
    if side.status != OK:
        return
    try:
        wrong = judge.verdict(side.prepare)
    except Exception as error:  # one side's fault must not hide another's
        side.status = f"{FAILED}: {first_line(error)}"
        return
    if wrong is not None:
        side.status = f"{WRONG}: {wrong.splitlines()[0]}"


def _time(
    result: Result,
    tensors: dict[str, Tensor],
    wanted: Sequence[Clock],
    names: Mapping[str, Sequence[str]] | None = None,
) -> Steps:
    """Time all sides that are right, or those of `names` by clock; returns what was timed."""
    problem = result.problem
    steps: dict[str, Callable[[], object]] = {}
    for side in result.sides:
        if side.status != OK:
            continue
        try:
            steps[side.name] = step_of(problem, side, tensors)
        except Exception as error:
            side.status = f"{FAILED}: {first_line(error)}"
    by_name = {side.name: side for side in result.sides}
    for clock in wanted:
        asked = steps if names is None else names.get(clock.name, ())
        chosen = {n: f for n, f in steps.items() if n in asked and by_name[n].status == OK}
        times, failed = clock.time(chosen)
        result.times[clock.name], result.clocks[clock.name] = times, clock
        for name, why in failed.items():
            if isinstance(clock, GraphClock):  # its other figures stay: the call itself works
                result.sides.append(_uncaptured(by_name[name], why))
            else:
                by_name[name].status = f"{FAILED}: {first_line(why)}"
    result.drop_faulty()
    return {name: function for name, function in steps.items() if by_name[name].status == OK}


def step_of(problem: Problem, side: Side, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
    """What is timed of a side: one step of `problem` on tensors of its own flags."""
    inputs = with_flags(problem, {name: x.detach() for name, x in tensors.items()})
    prepared = side.prepare(inputs)
    if not problem.wants_gradient:
        return prepared.forward
    out = prepared.restore("out", prepared.main().detach())
    return step(problem, prepared, problem.output_gradient(out))


def _measure_memory(result: Result, steps: Steps) -> None:
    problem = result.problem
    if memory.why_not(problem.device) is None and problem.operation != "import":
        for name, function in steps.items():
            result.memory[name] = memory.peak_bytes(function, problem.device)


def _uncaptured(side: Side, error: Exception) -> Side:
    status = f"{FAILED}: {first_line(error)}"
    return dataclasses.replace(side, name=f"{side.name} (CUDA graph)", status=status)


def clocks(suite: Suite, problem: Problem, wanted: Wanted | None = None) -> list[Clock]:
    """How a problem is timed on its device, in one pass."""
    wanted = wanted or Wanted()

    def rounds(default: int) -> int:
        return -(-(wanted.rounds or default) // wanted.passes)

    if problem.operation == "import":
        return [ReportedClock(min(rounds(PROCESS_ROUNDS), PROCESS_ROUNDS))]
    if problem.device == "cpu":
        usual = {1} if suite.launches else {1, torch.get_num_threads()}
        threads = sorted(wanted.threads or usual)
        return [HostClock(n, rounds(ROUNDS)) for n in threads]
    if suite.launches:
        clock: list[Clock] = [LaunchClock(rounds(ROUNDS))]
    else:
        clock = [DeviceClock(rounds(DEVICE_ROUNDS))]
    # A backward alone hangs on a forward that ran outside of the graph.
    if problem.flops < SMALL_FLOPS and problem.direction != "backward":
        clock.append(GraphClock(rounds(DEVICE_ROUNDS)))
    return clock


def absent(peers: Sequence[Peer], wanted: Wanted) -> dict[str, str]:
    """Why each of the peers asked for is not on this machine."""
    asked = [p for p in peers if wanted.peers is None or p.name in wanted.peers]
    return {p.name: reason for p in asked if (reason := p.missing()) is not None}


def fits(result: Result) -> dict[str, Any]:
    """Names of our first side and of the fastest peer, by clock, among those with a figure."""
    found = {}
    ours = [side.name for side in result.sides if side.ours]
    for clock, times in result.times.items():
        mine = next((name for name in ours if name in times), None)
        peers = [name for name in times if name not in ours]
        found[clock] = (mine, min(peers, key=lambda name: result.figure(clock, name), default=None))
    return found
