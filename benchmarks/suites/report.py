"""Recorded results in words: a page with pictures a machine, and a short table in README."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from . import machine
from .ceilings import CEILINGS
from .peers import MARK, marked
from .results import Row, figure, pairs, ratio
from .suites import SUITES
from .summary import conditions, recorded, summary

NAME = "report.md"
MOST_NAMED = 4
METHOD = f"""Every side passed the error budget against float64 before it was timed. *Time* is per
call, the median of its samples (the minimum where the clock is wall time over several threads), *±*
half the distance of the quartiles. *Speed-up* is over the fastest alternative: its time divided by
ours, so above 1 we are faster. *Share* is of the roofline's ceiling, which is named beside it and
was measured in the same run: {"; ".join(CEILINGS.values())}. An alternative with {MARK} writes its
result into memory that was made before, where ours makes it anew. How, and what is counted:
docs/benchmarks.md."""

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOTHING = "No results are recorded yet: `make bench` does it."


class MarkerError(ValueError):
    """README has no place for the table."""


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write `report.md` and its pictures into `folder`."""
    from . import plots  # which need matplotlib; README's table does not

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
    for name in dict.fromkeys(row["machine"] for row in rows):
        mine = [row for row in rows if row["machine"] == name]
        facts = [name]
        for fact in ("driver", "cuda", "cudnn", "python", "torch", "triton", "fused_attn",
                     "cpu_level", "commit"):  # fmt: skip
            values = sorted({row[fact] for row in mine if row[fact]})
            if values:
                facts.append(f"{fact} {', '.join(values)}")
        dates = sorted({row["date"] for row in mine})
        facts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
        lines.append("* " + "; ".join(facts))
    return lines


def _suite(name: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {name}", "",
        "| case | clock | ours | time, ms | ± | rate | share of ceiling | memory, MiB | "
        "fastest alternative | time, ms | speed-up |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]  # fmt: skip
    for ours, peer in pairs(rows):
        quotient = ratio(ours, peer)
        lines.append(
            f"| {ours['case']} | {ours['clock']} | {ours['side'].removeprefix('fused_attn:')} | "
            f"{milliseconds(ours)} | {_spread(ours)} | {_rate(ours)} | {_share(ours)} | "
            f"{_mebibytes(ours)} | {marked(peer['side'], peer['operation']) if peer else ''} | "
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
    return f"{float(row['share']):.0%} of {row['ceiling']}" if row["share"] else ""


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


def update_readme(readme: Path, root: Path | None = None) -> bool:
    """Write the table of all machines below `root` into `readme`; whether that changed it.

    Raises:
        MarkerError: the markers are not there.
    """
    return put(readme, BEGIN, END, readme_table(root))


def put(page: Path, begin: str, end: str, block: str) -> bool:
    """Write `block` between two markers of a page; whether that changed it.

    Raises:
        MarkerError: the markers are not there.
    """
    text = page.read_text()
    if begin not in text or end not in text:
        raise MarkerError(f"{page} needs the lines {begin} and {end}")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    new = f"{head}{begin}\n{block}\n{end}{tail}"
    if new != text:
        page.write_text(new)
    return new != text


def readme_table(root: Path | None = None) -> str:
    """What stands between the markers: eight rows a machine at the most, and a link."""
    parts = [_summary(folder, rows) for folder, rows in recorded(root)]
    return "\n\n".join(parts) if parts else NOTHING


def _summary(folder: Path, rows: Sequence[Row]) -> str:
    lines = summary(rows)
    dtypes = list(dict.fromkeys(dtype for line in lines for dtype in line.speedups))
    text = [
        f"{conditions(rows)}. Speed-up over the fastest alternative: min, median, max:",
        "",
        f"| | {' | '.join(dtypes)} | cases | most often the fastest alternative |",
        f"|---|{'---|' * len(dtypes)}--:|---|",
    ]
    for line in lines:
        cells = [_spread_of(line.speedups.get(dtype, [])) for dtype in dtypes]
        text.append(f"| {line.title} | {' | '.join(cells)} | {line.cases} | {line.fastest} |")
    if any(line.fastest.endswith(MARK) for line in lines):
        text += ["", f"{MARK} writes its result into memory that was made before."]
    bad = sum(r["status"].startswith(("wrong", "failed")) and r["ours"] == "yes" for r in rows)
    address = f"{machine.repository()}/blob/main/benchmarks/results/{folder.name}/{NAME}"
    text += ["", f"Ours wrong or failed: {bad} cases. Every case, and pictures: "
                  f"[{folder.name}]({address})."]  # fmt: skip
    return "\n".join(text)


def _spread_of(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    return f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}"
