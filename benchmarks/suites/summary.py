"""Recorded results in a few lines: what README's table and picture are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .peers import marked
from .results import MAIN_CLOCKS, Row, figure, pairs, read_file

# The rows of README's table: suites, and of which direction, of all if None.
SUMMARY: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("attention, forward", ("forward",), None),
    ("attention, backward", ("backward",), None),
    ("attention with masks, packed batches", ("masks", "packed"), None),
    ("decoding", ("decode",), None),
    ("norms, bias + activation, embedding", ("layer_norm", "bias_activation", "embedding"), None),
    ("linears where torch has no instructions", ("linear",), None),
    ("modules, inference", ("modules", "weights"), "forward"),
    ("modules, training", ("modules",), "training"),
    ("a call with nothing to compute", ("overhead",), None),
)


@dataclass(frozen=True)
class Line:
    """A row of the summary: speed-ups over the fastest alternative by dtype, and who that was."""

    title: str
    speedups: dict[str, list[float]]
    fastest: str

    @property
    def cases(self) -> int:
        return sum(len(found) for found in self.speedups.values())


def recorded(root: Path | None = None) -> list[tuple[Path, list[Row]]]:
    """Folders below `root` that have figures, with the rows of the main clocks."""
    root = root or machine.RESULTS
    found = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        rows = [row for path in sorted(folder.glob("*.csv")) for row in read_file(path)]
        rows = [row for row in rows if row["clock"] in MAIN_CLOCKS or row["status"] != "ok"]
        if pairs(rows):
            found.append((folder, rows))
    return found


def conditions(rows: Sequence[Row]) -> str:
    """Machine, threads, versions, commits and dates, without which a figure says nothing."""
    first = rows[0]
    threads = ", one thread" if first["device"] == "cpu" else f", driver {first['driver']}"
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    dates = sorted({row["date"][:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(sorted({row["torch"] for row in rows}))
    return f"{first['machine']}{threads}; torch {versions}; commit {commits}, {when}"


def summary(rows: Sequence[Row]) -> list[Line]:
    """The lines of `SUMMARY` that the rows have a figure for."""
    found = [(ours, peer) for ours, peer in pairs(rows) if peer is not None]
    lines = []
    for title, suites, direction in SUMMARY:
        mine = [
            (ours, peer) for ours, peer in found
            if ours["suite"] in suites and direction in (None, ours["direction"])
        ]  # fmt: skip
        if not mine:
            continue
        speedups: dict[str, list[float]] = {}
        for ours, peer in mine:
            speedups.setdefault(ours["dtype"], []).append(figure(peer) / figure(ours))
        most = Counter(marked(peer["side"], peer["operation"]) for _, peer in mine)
        lines.append(Line(title, speedups, most.most_common(1)[0][0]))
    return lines
