"""The table of recorded results in README, between its markers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import machine
from .results import Row, pairs, ratio, read_file
from .suites import SUITES

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOTHING = "No results are recorded yet: `make bench` does it."
# One clock a device: what hardly notices neighbours.
CLOCKS = ("CPU time, 1 thread", "device events", "wall time a call")


class MarkerError(ValueError):
    """README has no place for the table."""


def update(readme: Path, root: Path | None = None) -> bool:
    """Write the table of all machines below `root` into `readme`; whether that changed it.

    Raises:
        MarkerError: the markers are not there.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise MarkerError(f"{readme} needs the lines {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n{table(root)}\n{END}{tail}"
    if new != text:
        readme.write_text(new)
    return new != text


def table(root: Path | None = None) -> str:
    """What stands between the markers."""
    root = root or machine.RESULTS
    parts = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        rows = [row for path in sorted(folder.glob("*.csv")) for row in read_file(path)]
        rows = [row for row in rows if row["clock"] in CLOCKS or row["status"] != "ok"]
        if pairs(rows):
            parts.append(_machine(folder, rows))
    return "\n\n".join(parts) if parts else NOTHING


def _machine(folder: Path, rows: Sequence[Row]) -> str:
    first = rows[0]
    threads = ", one thread" if first["device"] == "cpu" else f", driver {first['driver']}"
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    dates = sorted({row["date"][:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(sorted({row["torch"] for row in rows}))
    lines = [
        f"{first['machine']}{threads}; torch {versions}; commit {commits}, {when}:",
        "",
        "| suite | dtype | cases | fastest peer's time over ours: least, median, most | "
        "most often the fastest peer |",
        "|---|---|--:|---|---|",
    ]
    for suite in SUITES:
        mine = [pair for pair in pairs(rows) if pair[0]["suite"] == suite.name]
        groups = dict.fromkeys((ours["direction"], ours["dtype"]) for ours, _ in mine)
        for direction, dtype in groups:
            group = [p for p in mine if (p[0]["direction"], p[0]["dtype"]) == (direction, dtype)]
            line = _line(group)
            if line is not None:
                name = suite.name if suite.name == direction else f"{suite.name}, {direction}"
                if not suite.dtypes:
                    name, dtype = suite.name, ""
                lines.append(f"| {name} | {dtype} | {line} |")
    bad = sum(r["status"].startswith(("wrong", "failed")) and r["ours"] == "yes" for r in rows)
    lines += ["", f"Ours wrong or failed: {bad} cases. All cases: "
                  f"[{folder.name}](benchmarks/results/{folder.name}/report.md)."]  # fmt: skip
    return "\n".join(lines)


def _line(group: Sequence[tuple[Row, Row | None]]) -> str | None:
    found = [(ratio(ours, peer), peer["side"]) for ours, peer in group if peer is not None]
    ratios = [quotient for quotient, _ in found if quotient is not None]
    if not ratios:
        return None
    fastest = Counter(side for _, side in found).most_common(1)[0][0]
    spread = f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}"
    return f"{len(ratios)} | {spread} | {fastest}"
