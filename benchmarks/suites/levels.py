"""What the gates' records say of instruction-set levels: the table of docs/performance.md."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from . import machine

BEGIN, END = "<!-- levels: begin -->", "<!-- levels: end -->"
PAGE = machine.CHECKOUT / "docs" / "performance.md"
# Kinds of classes, by words that a class has; the first that fits counts.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("packed batches", ("packed",)),
    ("a call with nothing to compute", ("tiny",)),
    ("decoding", ("decode",)),
    ("norms", ("add+layer_norm",)),
    ("bias + activation", ("bias+",)),
    ("encoder layers with padding, inference", ("encoder", "infer", "padding")),
    ("encoder layers with padding, training", ("encoder", "train", "padding")),
    ("encoder layers, inference", ("encoder", "infer")),
    ("encoder layers, training", ("encoder", "train")),
    ("attention module", ("module",)),
    ("attention, forward and backward", ("fwd+bwd",)),
    ("attention, forward", ("fwd",)),
)


def table(folder: Path) -> str:
    """Speed-ups over torch of every kind, dtype and record of `folder`: min, median, max."""
    records = [path for path in sorted(folder.glob("cpu_gates*.csv")) if path.stat().st_size]
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    heads, facts = [], []
    for path in records:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        head = f"{rows[0]['cpu_level']}, threads: {rows[0]['threads']}"
        heads.append(head)
        facts.append(f"{head}: torch {rows[0]['torch']}, {rows[0]['date'][:10]}")
        for row in rows:
            key = (kind(row["class"]), row["class"].split()[0])
            found.setdefault(key, {}).setdefault(head, []).append(float(row["ratio"]))
    order = {name: i for i, (name, _) in enumerate(reversed(KINDS))}
    lines = [
        f"{machine_of(records[0])}; {'; '.join(facts)}. Speed-up over the faster path of torch: "
        "min, median, max of the classes, and how many.",
        "",
        f"| | | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for (name, dtype), by_head in sorted(found.items(), key=lambda item: (order[item[0][0]], item)):
        cells = " | ".join(_cell(by_head.get(head, [])) for head in heads)
        lines.append(f"| {name} | {dtype} | {cells} |")
    return "\n".join(lines)


def kind(name: str) -> str:
    """The kind of a class of the gates.

    Raises:
        ValueError: it is none of `KINDS`.
    """
    for title, words in KINDS:
        if all(word in name for word in words):
            return title
    raise ValueError(f"`{name}` is of none of the kinds of benchmarks/suites/levels.py")


def machine_of(path: Path) -> str:
    with path.open(newline="") as file:
        return next(csv.DictReader(file))["machine"]


def _cell(ratios: list[float]) -> str:
    if not ratios:
        return "not recorded"
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return f"{low:.2f}, {middle:.2f}, {high:.2f} ({len(ratios)})"
