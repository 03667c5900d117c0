"""Pictures of recorded results: speed-ups, speed and memory by length; a short one for README."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no screen
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .ceilings import CEILINGS
from .peers import MARK, marked
from .results import MAIN_CLOCKS, Row, counts, pairs, ratio
from .suites import SUITES
from .summary import Line

# Okabe and Ito 2008: colours that the colour-blind can tell apart; ours is always the first.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#B8A500",
)  # fmt: skip
MARKERS = "osD^vP*X"
DPI = 80
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10, 20, 50, 100)  # of ratios
LEAST_MEMORY = 0.1  # MiB: memory is counted in pages, which come and go for other reasons too
CEILING_STYLE: dict[str, Any] = {"color": "0.35", "linewidth": 1.2, "linestyle": ":"}
Picture = tuple[str, str]
Styles = dict[str, tuple[str, str]]  # colour and marker by side
Panels = dict[tuple[str, str, str], list[Row]]  # by direction and dtype, head size, mask
Value = Callable[[Row], float | None]


def draw_all(folder: Path, rows: Sequence[Row]) -> list[Picture]:
    """Draw what the rows allow; returns titles and file names."""
    pictures = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device and counts(row)]
        pictures += _ratios(folder, device, mine)
        pictures += _against_length(folder, device, mine, "speed", _speed, "GFLOP/s")
        pictures += _against_length(folder, device, mine, "memory", _memory, "MiB beyond the start")
    return pictures


def _speed(row: Row) -> float | None:
    return float(row["gflops"]) if row["gflops"] else None


def _memory(row: Row) -> float | None:
    mebibytes = int(row["memory_bytes"] or 0) / 2**20
    return mebibytes if mebibytes >= LEAST_MEMORY else None


def _against_length(
    folder: Path, device: str, rows: Sequence[Row], name: str, value: Value, unit: str
) -> list[Picture]:
    """A row of panels for each direction and dtype, a column for each head size and mask."""
    clocks = [row["clock"] for row in rows if row["suite"] in ("forward", "backward")]
    if not clocks:
        return []
    clock = next((clock for clock in MAIN_CLOCKS if clock in clocks), clocks[0])
    panels: Panels = {}
    for direction in ("forward", "backward"):
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            chosen = [
                row for row in rows
                if (row["suite"], row["dtype"], row["clock"]) == (direction, dtype, clock)
                and value(row) is not None
            ]  # fmt: skip
            found = _panels(chosen)
            panels |= {(f"{direction}, {dtype}", f"{d}", v): x for (d, v), x in found.items()}
    if not panels:
        return []
    how = f" ({clock})" if name == "speed" else ", peak per call"
    title = f"Attention, {name}, {rows[0]['machine']}{how}"
    file = f"{name}-{device}.png"
    _draw_panels(folder / file, title, panels, value, unit)
    return [(title, file)]


def _panels(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """Rows by head size and mask, where there are two lengths of the same number of tokens."""
    panels: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["seqlen_q"] == row["seqlen_k"] and row["variant"] in ("full", "causal"):
            panels.setdefault((int(row["head_dim"]), row["variant"]), []).append(row)
    found = {}
    for panel, mine in sorted(panels.items(), key=lambda item: (item[0][1] == "causal", item[0])):
        by_work: dict[int, list[Row]] = {}
        for row in mine:
            work = math.prod(int(row[n]) for n in ("batch", "heads", "seqlen_q", "head_dim"))
            by_work.setdefault(work, []).append(row)
        longest = max(by_work.values(), key=lambda rows: len({row["seqlen_q"] for row in rows}))
        if len({row["seqlen_q"] for row in longest}) > 1:
            found[panel] = longest
    return found


def _draw_panels(path: Path, title: str, panels: Panels, value: Value, unit: str) -> None:
    down = list(dict.fromkeys(what for what, _, _ in panels))
    across = sorted({(v == "causal", int(d), v) for _, d, v in panels})
    fig, axes = pyplot.subplots(
        len(down), len(across), figsize=(3.4 * len(across) + 0.8, 2.6 * len(down) + 1.2),
        squeeze=False, sharey="row", layout="constrained",
    )  # fmt: skip
    styles = _styles([row for rows in panels.values() for row in rows])
    for i, what in enumerate(down):
        for j, (_, dim, variant) in enumerate(across):
            axis, rows = axes[i][j], panels.get((what, f"{dim}", variant), [])
            axis.set_title(f"{what}, head size {dim}, {variant}", fontsize=9)
            _draw_lines(axis, rows, styles, value)
            if value is _speed:
                _draw_ceiling(axis, rows)
            axis.set_xlabel("length" if i == len(down) - 1 else "")
            axis.set_ylabel(unit if j == 0 else "")
        if value is _memory:
            axes[i][0].set_yscale("log", base=2)
            axes[i][0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes[i][0].yaxis.set_minor_formatter(NullFormatter())
        else:  # once all panels of the row are drawn: a fixed limit ends their common scale
            axes[i][0].set_ylim(bottom=0)
    fig.suptitle(title, fontsize=12)
    handles = _legend([row for rows in panels.values() for row in rows], styles, value)
    fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)
    _save(fig, path)


def _legend(rows: Sequence[Row], styles: Styles, value: Value) -> list[Any]:
    """A line for each side, one for the ceiling by its name, and what the mark means."""
    names = {side: marked(side, "attention") for side in styles}
    handles = [
        pyplot.Line2D([], [], color=color, marker=marker, label=names[side])
        for side, (color, marker) in styles.items()
    ]
    ceilings = sorted({row["ceiling"] for row in rows if row["ceiling"]})
    if value is _speed and ceilings:
        label = "ceiling: " + ", ".join(CEILINGS.get(name, name) for name in ceilings)
        handles.append(pyplot.Line2D([], [], **CEILING_STYLE, label=label))
    if any(name.endswith(MARK) for name in names.values()):
        label = f"{MARK} writes into memory that was made before"
        handles.append(pyplot.Line2D([], [], linestyle="", label=label))
    return handles


def _draw_ceiling(axis: Any, rows: Sequence[Row]) -> None:
    rates = [float(row["ceiling_rate"]) for row in rows if row["ceiling_rate"]]
    if rates:
        axis.axhline(statistics.median(rates), **CEILING_STYLE)


def _styles(rows: Sequence[Row]) -> Styles:
    """Colour and marker of each side; ours come first."""
    sides = sorted({(row["ours"] != "yes", row["side"]) for row in rows})
    return {
        side: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)])
        for i, (_, side) in enumerate(sides)
    }


def _draw_lines(
    axis: Any,
    rows: Sequence[Row],
    styles: dict[str, tuple[str, str]],
    value: Value,
) -> None:
    lengths = sorted({int(row["seqlen_q"]) for row in rows})
    for side, (color, marker) in styles.items():
        points = sorted(
            (int(row["seqlen_q"]), v)
            for row in rows
            if row["side"] == side and (v := value(row)) is not None
        )
        if points:
            ours = side.startswith("fused_attn")
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5,
                      linewidth=2.4 if ours else 1.3, linestyle="-" if ours else "--",
                      zorder=3 if ours else 2)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_length(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def _length(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _ratios(folder: Path, device: str, rows: Sequence[Row]) -> list[Picture]:
    """Speed-ups: a panel for each clock, a line for each suite, direction and dtype."""
    panels: dict[str, dict[tuple[str, str, str], list[float]]] = {}
    for ours, peer in pairs(rows):
        quotient = ratio(ours, peer)
        if quotient is not None and ours["suite"] != "import":
            lines = panels.setdefault(ours["clock"], {})
            what = (ours["suite"], ours["direction"], ours["dtype"])
            lines.setdefault(what, []).append(quotient)
    keys = {key for lines in panels.values() for key in lines}
    if len(keys) < 2:
        return []
    title = f"Speed-up over the fastest alternative, {rows[0]['machine']}"
    file = f"ratios-{device}.png"
    _draw_ratios(folder / file, title, panels, _in_order(keys))
    return [(title, file)]


def _in_order(keys: set[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    order = [suite.name for suite in SUITES]
    return sorted(keys, key=lambda k: (order.index(k[0]) if k[0] in order else 99, k[1:]))


def _draw_ratios(
    path: Path,
    title: str,
    panels: dict[str, dict[tuple[str, str, str], list[float]]],
    keys: Sequence[tuple[str, str, str]],
) -> None:
    fig, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels) + 3.0, 0.3 * len(keys) + 1.8), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    dtypes = sorted({dtype for _, _, dtype in keys})
    colors = dict(zip(dtypes, PALETTE, strict=False))
    for axis, (clock, lines) in zip(axes[0], panels.items(), strict=True):
        for key, values in lines.items():
            y, color = keys.index(key), colors[key[2]]
            axis.plot(values, [y] * len(values), linestyle="", marker="o", color=color, alpha=0.65)
            middle = statistics.median(values)
            axis.plot([middle], [y], marker="|", markersize=15, markeredgewidth=2.5, color=color)
        axis.axvline(1.0, color="0.2", linewidth=1.2)
        axis.set_xscale("log")
        axis.set_title(clock, fontsize=11)
        axis.grid(axis="x", alpha=0.3)
    first = axes[0][0]
    first.set_yticks(range(len(keys)), [_line_name(key) for key in keys])
    first.set_ylim(len(keys) - 0.5, -0.5)
    _ticks(first, [x for lines in panels.values() for values in lines.values() for x in values])
    handles = [
        pyplot.Line2D([], [], color=color, marker="o", linestyle="", label=dtype)
        for dtype, color in colors.items()
    ]
    fig.suptitle(title, fontsize=12)
    fig.supxlabel("speed-up: right of 1 we are faster; points are cases, the bar is their median",
                  fontsize=10)  # fmt: skip
    axes[0][-1].legend(handles=handles, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(fig, path)


def draw_summary(path: Path, lines: Sequence[Line], conditions: str) -> None:
    """README's picture: for each line and dtype the cases' span, and a point at the median."""
    dtypes = list(dict.fromkeys(dtype for line in lines for dtype in line.speedups))
    fig, axis = pyplot.subplots(figsize=(8.5, 0.42 * len(lines) + 1.6), layout="constrained")
    for i, dtype in enumerate(dtypes):
        for y, line in enumerate(lines):
            if found := line.speedups.get(dtype):
                at, color = y + 0.3 * (i - (len(dtypes) - 1) / 2), PALETTE[i]
                axis.plot([min(found), max(found)], [at, at], color=color, linewidth=3, alpha=0.5)
                axis.plot([statistics.median(found)], [at], color=color, marker="o", markersize=7)
        axis.plot([], [], color=PALETTE[i], marker="o", linewidth=3, label=dtype)
    axis.axvline(1.0, color="0.2", linewidth=1.2)
    axis.set_xscale("log")
    axis.set_yticks(range(len(lines)), [line.title for line in lines])
    axis.set_ylim(len(lines) - 0.5, -0.5)
    _ticks(axis, [x for line in lines for found in line.speedups.values() for x in found])
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("speed-up over the fastest alternative (line: min to max, point: median)")
    axis.set_title(textwrap.fill(conditions, 90), fontsize=9)
    axis.legend(fontsize=9)
    _save(fig, path)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    shown = {x for x in TICKS if min(values) / 1.3 < x < max(values) * 1.3}
    axis.set_xticks(sorted({1, *shown}))


def _line_name(key: tuple[str, str, str]) -> str:
    suite, direction, dtype = key
    return f"{suite} {dtype}" if suite == direction else f"{suite} {direction} {dtype}"


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1)  # no label is cut
    pyplot.close(fig)
