"""What a self-test shows: a line while it runs, a table that fits a screen at the end."""

from __future__ import annotations

from typing import Any

from .calls import DTYPES

Finding = dict[str, Any]

BAD = ("failed", "hung", "died", "left out")
MOST_LINES = 10  # of cases that did not pass; the others are counted
_CELL = 15


def table(findings: list[Finding]) -> str:
    """A line for each operation, backend and variant, a column for each dtype; then what is wrong.

    A cell is "passed/of", and the least of torch's time over ours where it was measured.
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f["operation"], f["backend"], f.get("variant", "")), []).append(f)
    heading = "".join(f"{dtype:>{_CELL}}" for dtype in DTYPES)
    lines = [f"{'operation':<16}{'backend':<17}{heading}"]
    for (operation, backend, variant), own in groups.items():
        cells = [_cell([f for f in own if f["dtype"] == dtype]) for dtype in DTYPES]
        who = f"{backend} {variant}".strip()
        lines.append(f"{operation:<16}{who:<17}" + "".join(f"{cell:>{_CELL}}" for cell in cells))
    if any(f["status"] == "timed" for f in findings):
        lines.append("x: torch's own time over ours, the least; below 1 torch is faster")
    return "\n".join([*lines, *_skipped(findings), *_bad(findings)])


def _cell(findings: list[Finding]) -> str:
    tried = [f["status"] for f in findings if f["status"] == "passed" or f["status"] in BAD]
    if not tried:
        return "-"
    ratios = [f["ratio"] for f in findings if f["status"] == "timed"]
    speed = f" {min(ratios):.2f}x" if ratios else ""
    return f"{tried.count('passed')}/{len(tried)}{speed}"


def _skipped(findings: list[Finding]) -> list[str]:
    """A line for each reason why something says nothing here."""
    reasons: dict[str, dict[str, None]] = {}
    for f in findings:
        if f["status"] == "skipped":
            reasons.setdefault(f["why"], {})[f["case"]] = None
    return [f"skipped, {why}: {', '.join(names)}"[:100] for why, names in reasons.items()]


def _bad(findings: list[Finding]) -> list[str]:
    bad = [f for f in findings if f["status"] in BAD]
    lines = []
    for f in bad[:MOST_LINES]:
        who = f"{f['operation']} {f['backend']} {f.get('variant', '')}".strip()
        what = f"{who} {f['dtype']}: {f['case']}"
        lines.append(f"{f['status'].upper()} {what}: {f.get('why', '')}")
    more = [f"... and {len(bad) - MOST_LINES} more"] if len(bad) > MOST_LINES else []
    return [*lines, *more]


class Progress:
    """A line that says what is being tried."""

    def __init__(self, stream: Any, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet or not stream.isatty()
        self._count, self._who = 0, ""

    def begin(self, operation: str, backend: str, variant: str = "") -> None:
        self._who = f"{operation} {backend} {variant}".strip()

    def step(self, finding: Finding) -> None:
        self._count += 1
        if not self._quiet:
            line = f"{self._count:>4} {self._who} {finding['dtype']} {finding['case']}"
            self._stream.write(f"\r{line[:78]:<78}")
            self._stream.flush()

    def end(self) -> None:
        if not self._quiet:
            self._stream.write("\r" + " " * 78 + "\r")
