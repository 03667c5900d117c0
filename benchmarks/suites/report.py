"""Recorded results as one Markdown page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import plots
from .results import Row, figure, pairs, ratio
from .suites import SUITES

NAME = "report.md"
MOST_NAMED = 4
METHOD = """Every side passed the error budget against float64 before it was timed. *Time* is the
median (of wall time over several threads the minimum), *±* half the distance of the quartiles,
*ratio* the fastest peer's time over ours: above 1, we are faster. *Share* is of the ceiling that
bounds the operation, measured in the same run: multiply-adds in registers or GEMM, or copying.
How, and what is counted: docs/benchmarks.md."""


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write `report.md` and its pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw_all(folder, rows)
    (folder / NAME).write_text(render(rows, pictures))


def render(rows: Sequence[Row], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The page; `pictures` are pairs of title and file name."""
    lines = ["# Benchmarks", "", *_machines(rows), "", METHOD, ""]
    if pictures:
        lines += ["## Pictures", ""]
        for title, name in pictures:
            lines += [f"![{title}]({name})", ""]
    order = [suite.name for suite in SUITES]
    names = list(dict.fromkeys(row["suite"] for row in rows))
    for suite in sorted(names, key=lambda s: order.index(s) if s in order else len(order)):
        lines += _suite(suite, [row for row in rows if row["suite"] == suite])
    lines += _without_figure(rows)
    return "\n".join(lines).rstrip() + "\n"


def _machines(rows: Sequence[Row]) -> list[str]:
    """Machine, versions, commits and dates that the rows come from."""
    lines = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        mine = [row for row in rows if row["machine"] == machine]
        facts = [machine]
        for name in ("driver", "cuda", "cudnn", "python", "torch", "triton", "fused_attn",
                     "cpu_level", "commit"):  # fmt: skip
            values = sorted({row[name] for row in mine if row[name]})
            if values:
                facts.append(f"{name} {', '.join(values)}")
        dates = sorted({row["date"] for row in mine})
        facts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
        lines.append("* " + "; ".join(facts))
    return lines


def _suite(name: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {name}", "",
        "| case | clock | ours | time, ms | ± | rate | share | memory, MiB | best peer | "
        "time, ms | ratio |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]  # fmt: skip
    for ours, peer in pairs(rows):
        quotient = ratio(ours, peer)
        lines.append(
            f"| {ours['case']} | {ours['clock']} | {ours['side'].removeprefix('fused_attn:')} | "
            f"{milliseconds(ours)} | {_spread(ours)} | {_rate(ours)} | {_share(ours)} | "
            f"{_mebibytes(ours)} | {peer['side'] if peer else ''} | "
            f"{milliseconds(peer) if peer else ''} | "
            f"{'' if quotient is None else f'{quotient:.2f}'} |"
        )
    return [*lines, ""]


def milliseconds(row: Row) -> str:
    return f"{figure(row) * 1e3:.3g}"


def _spread(row: Row) -> str:
    low, median, high = (float(row[name]) for name in ("q25_s", "median_s", "q75_s"))
    return f"{50 * (high - low) / median:.0f} %"


def _rate(row: Row) -> str:
    if row["ceiling"] != "copy" and row["gflops"]:
        return f"{row['gflops']} GF/s"
    return f"{row['gbytes']} GB/s" if row["gbytes"] else ""


def _share(row: Row) -> str:
    return f"{float(row['share']):.0%}" if row["share"] else ""


def _mebibytes(row: Row) -> str:
    return f"{int(row['memory_bytes']) / 2**20:.1f}" if row["memory_bytes"] else ""


def _without_figure(rows: Sequence[Row]) -> list[str]:
    """Who has no figure, and why; the cases of what is wrong or fails, as long as they are few."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["side"], row["status"]), []).append(row)
    if not found:
        return []
    lines = ["## Without a figure", "", "| side | status | suites | cases |", "|---|---|---|---|"]
    for (side, status), mine in sorted(found.items()):
        suites = ", ".join(dict.fromkeys(row["suite"] for row in mine))
        cases = list(dict.fromkeys(row["case"] for row in mine))
        bad = status.startswith(("wrong", "failed")) and len(cases) <= MOST_NAMED
        which = "; ".join(cases) if bad else f"{len(cases)}"
        lines.append(f"| {side} | {status.replace('|', '/')} | {suites} | {which} |")
    return [*lines, ""]
