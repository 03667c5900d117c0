"""Recorded results: a CSV file a suite; a row a case, side and clock, with its machine."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from .machine import environment

SHAPE = (
    "batch", "heads", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "rows", "width", "variant",
)  # fmt: skip
COLUMNS = (
    "suite", "case", "operation", "direction", "dtype", "device", *SHAPE, "side", "ours", "status",
    "clock", "samples", "min_s", "q25_s", "median_s", "q75_s", "max_s", "flops", "bytes", "gflops",
    "gbytes", "ceiling", "ceiling_rate", "share", "memory_bytes", "memory_is", "machine",
    "cpu_level", "driver", "cuda", "cudnn", "python", "torch", "triton", "fused_attn", "commit",
    "date",
)  # fmt: skip
# One clock a device, for tables and pictures that show no more: what hardly notices neighbours.
MAIN_CLOCKS = ("CPU time, 1 thread", "device events", "wall time a call")
Row = dict[str, str]


class ResultsError(ValueError):
    """Results that cannot be read; the message says which and why."""


def key(row: Row) -> tuple[str, ...]:
    """What makes two rows of two runs the same measurement."""
    return tuple(row[name] for name in ("suite", "case", "device", "side", "clock"))


def save(folder: Path, rows: Sequence[dict[str, object]], device: str) -> None:
    """Write `rows` into their suites' files in `folder`.

    A case measured again replaces its rows; those of other cases stay as they are.
    """
    facts = environment(device)
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        complete = {name: str(row.get(name, "")) for name in COLUMNS} | facts
        by_suite.setdefault(complete["suite"], []).append(complete)
    folder.mkdir(parents=True, exist_ok=True)
    for suite, new in by_suite.items():
        path = folder / f"{suite}.csv"
        again = {(row["case"], row["device"]) for row in new}
        kept = [r for r in read_file(path) if (r["case"], r["device"]) not in again]
        _write(path, [*kept, *new])


def save_rows(path: Path, rows: Sequence[dict[str, object]], name: str) -> None:
    """Write rows of any columns to one CSV file, the machine beside each.

    A row takes the place of one with the same `name` column; others stay, if their columns fit.
    """
    facts = environment()
    columns = [*rows[0], *facts]
    found: dict[object, dict[str, object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames == columns:
                found = {row[name]: dict(row) for row in reader}
    found.update({row[name]: {**row, **facts} for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found.values())


def _write(path: Path, rows: Iterable[Row]) -> None:
    partial = path.with_suffix(".part")  # a run that is stopped while writing loses nothing
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read_file(path: Path) -> list[Row]:
    """The rows of a suite's file; none if there is no such file, or if it is no suite's."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"suite", "case", "side", "status"} <= set(reader.fieldnames or ()):
            return []
        return [{name: row.get(name) or "" for name in COLUMNS} for row in reader]


def read(path: Path) -> list[Row]:
    """The rows of a file, or of all suites' files in a folder.

    Raises:
        ResultsError: there is nothing at `path`, or no suite's results.
    """
    if not path.exists():
        raise ResultsError(f"there is nothing at {path}")
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    rows = [row for file in files for row in read_file(file)]
    if not rows:
        raise ResultsError(f"{path} holds no results of `python -m benchmarks ... --save`")
    return rows


def counts(row: Row) -> bool:
    """Whether a row has a figure that counts."""
    return row["status"] == "ok" and row["median_s"] != ""


def figure(row: Row) -> float:
    """Seconds that stand for all samples: as the clock's `figure` of `timing`."""
    several = row["clock"].startswith("wall time, ")
    return float(row["min_s"] if several else row["median_s"])


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Our first side of every case and clock, and its fastest peer."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if counts(row):
            case = (row["suite"], row["case"], row["device"], row["clock"])
            cases.setdefault(case, []).append(row)
    found = []
    for sides in cases.values():
        ours = [row for row in sides if row["ours"] == "yes"]
        peers = [row for row in sides if row["ours"] == "no"]
        if ours:
            fastest = min(peers, key=figure, default=None)
            found.append((ours[0], fastest))
    return found


def ratio(ours: Row, peer: Row | None) -> float | None:
    """Peer's time over ours: above 1, we are faster."""
    return None if peer is None else figure(peer) / figure(ours)
