"""What a run prints: a line a case and clock, and why a side has no figure."""

from __future__ import annotations

import torch

from . import machine, peers, shapes
from .problem import Problem
from .run import ABSENT, Result, fits
from .suites import SUITES, Suite
from .timing import Timing

HEADER = (
    f"{'case':<52} {'ours':<16} {'time':>10} {'± %':>4} {'rate':>11} {'share':>6} {'memory':>9}  "
    f"{'fastest other':<15} {'time':>10} {'×':>6}"
)


def heading(device: str) -> None:
    """Machine and versions: no table without them."""
    facts = machine.environment(device)
    names = ("machine", "driver", "torch", "triton", "fused_attn", "commit", "date")
    print(", ".join(facts[n] if n in ("machine", "date") else f"{n} {facts[n]}"
                    for n in names if facts[n]))  # fmt: skip


class Table:
    """Prints results as they come; the same reason for the same side once."""

    def __init__(self) -> None:
        self.cases = 0
        self._suite = ""
        self._said: set[tuple[str, str]] = set()

    def add(self, result: Result) -> None:
        self.cases += 1
        self._begin(result.suite)
        for clock, (ours, peer) in fits(result).items():
            several = f" ({_short(clock)})" if len(result.times) > 1 else ""
            print(self._line(result, clock, f"{result.problem.label}{several}", ours, peer))
        for side in result.sides:
            if side.status == "ok" or side.verdict == ABSENT:
                continue
            if (side.name, side.status) not in self._said:
                self._said.add((side.name, side.status))
                print(f"    no figure: {side.name:<20} {side.status}", flush=True)

    def _begin(self, suite: str) -> None:
        if suite != self._suite:
            self._suite = suite
            print(f"\n[{suite}]\n{HEADER}", flush=True)

    def _line(
        self, result: Result, clock: str, label: str, ours: str | None, peer: str | None
    ) -> str:
        problem = result.problem
        line = f"{label:<52}"
        if ours is None:
            line += f" {'none':<16}" + " " * 45
        else:
            time, figure = result.times[clock][ours], result.figure(clock, ours)
            share = _share(result, clock, ours)
            line += f" {ours.removeprefix('fused_attn:'):<16} {_seconds(figure):>10}"
            line += f" {_spread(time):>4} {_rate(problem, figure):>11} {share:>6}"
            line += f" {_bytes(result.memory.get(ours)):>9}"
        if peer is not None:
            theirs = result.figure(clock, peer)
            ratio = f"{theirs / result.figure(clock, ours):6.2f}" if ours is not None else ""
            line += f"  {peer:<15} {_seconds(theirs):>10} {ratio}"
        return line


def _short(clock: str) -> str:
    return clock.replace("CPU time, 1 thread", "1 thread").replace("wall time, ", "")


def _share(result: Result, clock: str, side: str) -> str:
    for row in result.rows():
        if row["side"] == side and row.get("clock") == clock and "share" in row:
            return f"{float(str(row['share'])):.0%}"
    return ""


def _spread(time: Timing) -> str:
    return f"{50 * (time.high - time.low) / time.median:.0f}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError("unreachable")


def _rate(problem: Problem, seconds: float) -> str:
    if problem.bound == "compute" and problem.flops:
        return f"{problem.flops / seconds / 1e9:.4g} GF/s"
    if problem.bytes:
        return f"{problem.bytes / seconds / 1e9:.3g} GB/s"
    return ""


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def catalogue() -> str:
    """Suites, shapes, and who is really here, in words."""
    lines = ["suites"]
    lines += [f"  {suite.name:<16} {suite.description}" for suite in SUITES]
    lines += ["", "shapes (--shapes NAME, or SIZES; ,VARIANT may follow)"]
    kinds: dict[int, tuple[shapes.ShapeKind, list[Suite]]] = {}
    for suite in SUITES:
        kinds.setdefault(id(suite.kind), (suite.kind, []))[1].append(suite)
    for kind, users in kinds.values():
        if not kind.fields:
            continue
        lines.append(f"  {', '.join(suite.name for suite in users)}: {kind.form}")
        lines += [f"    {name:<14} {len(sizes)} shapes" for name, sizes in kind.sets.items()]
        lines += [
            f"    {suite.name}: {', '.join(suite.variants)}" for suite in users if suite.variants
        ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += ["", f"ours, on {device} (by the operations of their suites)", *_ours(device)]
    lines += ["", f"alternatives, on {device}", *_alternatives(device)]
    return "\n".join(lines)


def _toys(device: str) -> list[Problem]:
    """Small problems of every suite, one for each direction, dtype and variant."""
    suites = [suite for suite in SUITES if suite.name != "import"]
    return [problem for suite in suites for problem in suite.problems(device, wanted=suite.toy)]


def _ours(device: str) -> list[str]:
    """Our backends: what each can run here, or why it can run nothing."""
    answers: dict[str, dict[str, list[str]]] = {}
    for problem in _toys(device):
        with torch.set_grad_enabled(problem.wants_gradient):
            sides = problem.ours(problem.tensors())
        for side in sides:
            backend = side.name.partition(":")[2]
            if backend:
                answers.setdefault(backend, {}).setdefault(problem.operation, []).append(
                    "; ".join(side.reasons)
                )
    return [f"  {backend:<16} {_said(found)}" for backend, found in answers.items()]


def _alternatives(device: str) -> list[str]:
    """Peers: what each can run here, or why it is missing or can run nothing."""
    lines, problems = [], _toys(device)
    for peer in peers.PEERS:
        if (reason := peer.missing()) is not None:
            lines.append(f"  {peer.name:<16} not here: {reason} ({', '.join(peer.operations)})")
            continue
        found: dict[str, list[str]] = {}
        for problem in problems:
            if peer.serves(problem.operation):
                found.setdefault(problem.operation, []).append("; ".join(peer.why_not(problem)))
        note = " compiles for seconds a case" if peer.compiles and device == "cpu" else ""
        lines.append(f"  {peer.name:<16} {_said(found)}{note}")
    return lines


def _said(answers: dict[str, list[str]]) -> str:
    """The operations with a case without a reason against it; without any, the reasons."""
    able = [operation for operation, reasons in answers.items() if "" in reasons]
    if able:
        return f"here ({', '.join(able)})"
    reasons = dict.fromkeys(reason for found in answers.values() for reason in found)
    return f"not here: {next(iter(reasons), 'has none of these operations')}"
