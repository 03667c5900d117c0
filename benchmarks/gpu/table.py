"""The one short table that `make gpu` ends with, from the files of its parts; it fits a screen."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..suites import results
from ..suites.suites import SUITES

BACKENDS = ("cuda", "triton")
ATTENTION = ("forward", "backward")
CLOCK = "device events"
FLEX = "flex"  # a peer that has a column of its own beside the best one
DETERMINISTIC = "deterministic"  # folder of the backward under torch's switch


def render(folder: Path, outcomes: dict[str, str]) -> str:
    """Outcomes, ceilings, attention by head size against its best peer, and every other suite."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in results.read_file(path)]
    lines = ["", *_machine(folder), *_outcomes(outcomes), *_ceilings(folder)]
    if not rows:
        return "\n".join(lines)
    columns = ("cuda", "triton", FLEX)
    heading = "".join(f"{name:>8}" for name in columns)
    lines += ["", f"{'attention, TFLOP/s':36}{heading}{'best peer':>24}{'ratio':>7}"]
    lines += _attention([row for row in rows if row["suite"] in ATTENTION])
    lines += _deterministic(folder, rows)
    lines += ["", f"{'least, median and most of':42}{'cases':>6}"
              f"{'best peer over ours':>22}{'share of ceiling':>22}"]  # fmt: skip
    for suite in SUITES:
        lines += _suite(suite.name, [row for row in rows if row["suite"] == suite.name])
    lines += _bad(rows)
    return "\n".join(lines)


def _machine(folder: Path) -> list[str]:
    path = folder / "machine.json"
    if not path.exists():
        return []
    m = json.loads(path.read_text())
    return [f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, triton {m['triton']}, "
            f"commit {m['commit']}"]  # fmt: skip


def _outcomes(outcomes: dict[str, str]) -> list[str]:
    """Two parts a line: a screen is short."""
    cells = [f"{name:18} {outcome:25}" for name, outcome in outcomes.items()]
    return ["".join(cells[i : i + 2]).rstrip() for i in range(0, len(cells), 2)]


def _ceilings(folder: Path) -> list[str]:
    path = folder / "ceilings.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return ["ceilings           " + ", ".join(f"{name} {value}" for name, value in found.items())]


def _attention(rows: Sequence[results.Row]) -> list[str]:
    """A line a case of 8192 keys: the others are in the file."""
    cases: dict[str, list[results.Row]] = {}
    for row in rows:
        if row["seqlen_k"] == "8192" and row["heads"] == row["heads_kv"]:
            cases.setdefault(row["case"], []).append(row)
    return [_case(sides) for sides in cases.values()]


def _deterministic(folder: Path, rows: Sequence[results.Row]) -> list[str]:
    """How fast our backends' deterministic backward is, their default being 1."""
    default = {results.key(row): row for row in rows if results.counts(row)}
    lines = []
    for backend in BACKENDS:
        ratios = [
            results.figure(default[results.key(row)]) / results.figure(row)
            for row in results.read_file(folder / DETERMINISTIC / "backward.csv")
            if row["side"] == f"fused_attn:{backend}" and row["clock"] == CLOCK
            and results.counts(row) and results.key(row) in default
        ]  # fmt: skip
        if ratios:
            text = f"backward, deterministic over default, {backend}"
            lines.append(f"{text:48}{_spread(ratios):>22}")
    return lines


def _case(rows: Sequence[results.Row]) -> str:
    first = rows[0]
    causal = " causal" if first["variant"] == "causal" else ""
    name = f"{first['direction']} D{first['head_dim']} L{first['seqlen_k']}{causal}"
    sides = {row["side"]: row for row in rows if row["clock"] in (CLOCK, "")}
    ours = [sides.get(f"fused_attn:{backend}") for backend in BACKENDS]
    found = results.pairs([row for row in rows if row["clock"] == CLOCK])
    peer = found[0][1] if found else None
    mine = next((row for row in ours if row is not None and results.counts(row)), None)
    best = f"{float(peer['gflops']) / 1e3:8.0f} ({peer['side']})" if peer else "-"
    ratio = results.ratio(mine, peer) if mine is not None else None
    cells = "".join(_cell(row) for row in (*ours, sides.get(FLEX)))
    return f"{name:36}{cells}{best:>24}" + (f"{'-':>7}" if ratio is None else f"{ratio:7.2f}")


def _cell(row: results.Row | None) -> str:
    if row is None:
        return f"{'-':>8}"
    if not results.counts(row):
        return f"{row['status'].partition(':')[0].upper():>8}"
    return f"{float(row['gflops']) / 1e3:8.0f}"


def _suite(name: str, rows: Sequence[results.Row]) -> list[str]:
    """One line a suite, direction and clock: attention's own are above already."""
    if name in ATTENTION:
        rows = [row for row in rows if row["clock"] == "CUDA graph"]
    lines = []
    groups = dict.fromkeys((row["direction"], row["clock"]) for row in rows if results.counts(row))
    for direction, clock in groups:
        found = results.pairs(
            [row for row in rows if (row["direction"], row["clock"]) == (direction, clock)]
        )
        ratios = [r for ours, peer in found if (r := results.ratio(ours, peer)) is not None]
        shares = [float(ours["share"]) for ours, _ in found if ours["share"]]
        label = f"{name} {direction}" if name != direction else name
        how = "" if clock == CLOCK else f" ({clock})"
        lines.append(f"{label + how:42}{len(found):>6}{_spread(ratios):>22}{_spread(shares):>22}")
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{min(values):.2f} {statistics.median(values):.2f} {max(values):.2f}"


def _bad(rows: Sequence[results.Row]) -> list[str]:
    """Ours that are wrong or fail: the first few in full."""
    bad = [row for row in rows if row["ours"] == "yes"
           and row["status"].startswith(("wrong", "failed"))]  # fmt: skip
    lines = [f"{row['side']} {row['case']}: {row['status'][:90]}" for row in bad[:4]]
    more = [f"... and {len(bad) - 4} more"] if len(bad) > 4 else []
    return ["", *lines, *more] if bad else []
