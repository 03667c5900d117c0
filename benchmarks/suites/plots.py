"""Pictures of recorded results: speed against length, roofline, memory, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no screen
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .results import Row, counts, pairs, ratio
from .suites import SUITES

# Okabe and Ito 2008: colours that the colour-blind can tell apart; ours is always the first.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#B8A500",
)  # fmt: skip
MARKERS = "osD^vP*X"
DPI = 100
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10, 20, 50, 100)  # of ratios
Picture = tuple[str, str]


def draw_all(folder: Path, rows: Sequence[Row]) -> list[Picture]:
    """Draw what the rows allow; returns titles and file names."""
    counted = [row for row in rows if counts(row)]
    return [
        *_against_length(folder, counted, "speed", _speed, "GFLOP/s"),
        *_against_length(folder, counted, "memory", _memory, "peak memory of a call, MiB"),
        *_roofline(folder, counted),
        *_ratios(folder, counted),
    ]


def _speed(row: Row) -> float | None:
    return float(row["gflops"]) if row["gflops"] else None


def _memory(row: Row) -> float | None:
    return int(row["memory_bytes"]) / 2**20 if row["memory_bytes"] else None


def _against_length(
    folder: Path,
    rows: Sequence[Row],
    name: str,
    value: Callable[[Row], float | None],
    unit: str,
) -> list[Picture]:
    """A picture for forward and backward, dtype and clock; a panel a head size and mask."""
    pictures = []
    for direction in ("forward", "backward"):
        mine = [row for row in rows if row["suite"] == direction and value(row) is not None]
        groups = dict.fromkeys((row["device"], row["dtype"], row["clock"]) for row in mine)
        if name == "memory":  # the same by every clock
            groups = dict.fromkeys(_first_clocks(list(groups)))
        for device, dtype, clock in groups:
            chosen = [
                row for row in mine
                if (row["device"], row["dtype"], row["clock"]) == (device, dtype, clock)
            ]  # fmt: skip
            panels = _panels(chosen)
            if not panels:
                continue
            how = f" ({clock})" if name == "speed" else ""
            file = f"{name}-{direction}-{dtype}-{device}{'-' * bool(how)}{_slug(how)}.png"
            title = f"{dtype} attention {direction}: {name} on {chosen[0]['machine']}{how}"
            _draw_panels(folder / file, title, panels, value, unit, logarithmic=name == "memory")
            pictures.append((title, file))
    return pictures


def _first_clocks(groups: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    first: dict[tuple[str, str], tuple[str, str, str]] = {}
    for group in groups:
        first.setdefault(group[:2], group)
    return list(first.values())


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


def _draw_panels(
    path: Path,
    title: str,
    panels: dict[tuple[int, str], list[Row]],
    value: Callable[[Row], float | None],
    unit: str,
    logarithmic: bool,
) -> None:
    variants = list(dict.fromkeys(variant for _, variant in panels))
    dims = sorted({dim for dim, _ in panels})
    fig, axes = pyplot.subplots(
        len(variants), len(dims), figsize=(4.6 * len(dims) + 0.6, 3.5 * len(variants) + 1.3),
        squeeze=False, sharey="row", layout="constrained",
    )  # fmt: skip
    styles = _styles([row for rows in panels.values() for row in rows])
    for i, variant in enumerate(variants):
        for j, dim in enumerate(dims):
            axis = axes[i][j]
            axis.set_title(f"head size {dim}, {variant}", fontsize=11)
            _draw_lines(axis, panels.get((dim, variant), []), styles, value)
            axis.set_xlabel("length" if i == len(variants) - 1 else "")
            axis.set_ylabel(unit if j == 0 else "")
        if logarithmic:
            axes[i][0].set_yscale("log", base=2)
            axes[i][0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes[i][0].yaxis.set_minor_formatter(NullFormatter())
        else:  # once all panels of the row are drawn: a fixed limit ends their common scale
            axes[i][0].set_ylim(bottom=0)
    handles = [
        pyplot.Line2D([], [], color=color, marker=marker, label=side)
        for side, (color, marker) in styles.items()
    ]
    fig.suptitle(title, fontsize=12)
    fig.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=9)
    _save(fig, path)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
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
    value: Callable[[Row], float | None],
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


def _roofline(folder: Path, rows: Sequence[Row]) -> list[Picture]:
    """Speed against operations a byte, below what multiply-adds and copying allow."""
    pictures = []
    mine = [row for row in rows if row["gflops"] and row["gbytes"] and row["ceiling_rate"]]
    for device, dtype, clock in dict.fromkeys(
        (row["device"], row["dtype"], row["clock"]) for row in mine
    ):
        chosen = [
            row for row in mine
            if (row["device"], row["dtype"], row["clock"]) == (device, dtype, clock)
        ]  # fmt: skip
        compute = {row["ceiling"]: float(row["ceiling_rate"]) for row in chosen
                   if row["ceiling"] != "copy"}  # fmt: skip
        # Copying bounds the memory-bound suites, which know no FLOPs: ask all rows of the clock.
        copying = [
            float(row["ceiling_rate"]) for row in rows
            if row["ceiling"] == "copy" and (row["device"], row["clock"]) == (device, clock)
        ]  # fmt: skip
        if not compute:
            continue
        file = f"roofline-{dtype}-{device}-{_slug(clock)}.png"
        title = f"Roofline, {dtype} on {chosen[0]['machine']} ({clock})"
        _draw_roofline(folder / file, title, pairs(chosen), compute, copying)
        pictures.append((title, file))
    return pictures


def _draw_roofline(
    path: Path,
    title: str,
    points: Sequence[tuple[Row, Row | None]],
    compute: dict[str, float],
    copying: Sequence[float],
) -> None:
    fig, axis = pyplot.subplots(figsize=(8.6, 5.6), layout="constrained")
    suites = list(dict.fromkeys(ours["suite"] for ours, _ in points))
    for i, suite in enumerate(suites):
        color, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        for filled, rows in (
            (True, [ours for ours, _ in points if ours["suite"] == suite]),
            (False, [peer for ours, peer in points if ours["suite"] == suite and peer]),
        ):
            axis.scatter(
                [float(row["flops"]) / float(row["bytes"]) for row in rows],
                [float(row["gflops"]) for row in rows],
                marker=marker, s=38, edgecolors=color, facecolors=color if filled else "none",
                label=f"{suite}, {'ours' if filled else 'best peer'}", zorder=3,
            )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="GFLOP/s")
    left, right = axis.get_xlim()
    for name, rate in compute.items():
        axis.axhline(rate, color="0.35", linewidth=1.2)
        axis.annotate(f"{name}: {rate:.0f} GF/s", (0.01, rate), xytext=(0, 3), fontsize=9,
                      xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    if copying:
        rate = max(copying)
        ends = [left, min(right, max(compute.values()) / rate)]
        axis.plot(ends, [x * rate for x in ends], color="0.35", linewidth=1.2, linestyle=":",
                  label=f"copying: {rate:.0f} GB/s")  # fmt: skip
    axis.set_xlim(left, right)
    axis.set_title(title, fontsize=12)
    axis.grid(which="both", alpha=0.2)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    _save(fig, path)


def _ratios(folder: Path, rows: Sequence[Row]) -> list[Picture]:
    """Fastest peer over ours, a point a case, a line a suite, direction and dtype."""
    pictures = []
    for device, clock in dict.fromkeys((row["device"], row["clock"]) for row in rows):
        mine = [row for row in rows if (row["device"], row["clock"]) == (device, clock)]
        lines: dict[tuple[str, str, str], list[float]] = {}
        for ours, peer in pairs(mine):
            quotient = ratio(ours, peer)
            if quotient is not None:
                what = (ours["suite"], ours["direction"], ours["dtype"])
                lines.setdefault(what, []).append(quotient)
        if len(lines) < 2:
            continue
        file = f"ratios-{device}-{_slug(clock)}.png"
        title = f"Fastest peer's time over ours, {mine[0]['machine']} ({clock})"
        _draw_ratios(folder / file, title, lines)
        pictures.append((title, file))
    return pictures


def _draw_ratios(path: Path, title: str, lines: dict[tuple[str, str, str], list[float]]) -> None:
    order = [suite.name for suite in SUITES]
    keys = sorted(lines, key=lambda k: (order.index(k[0]) if k[0] in order else 99, k[1:]))
    fig, axis = pyplot.subplots(figsize=(8.6, 0.34 * len(keys) + 1.6), layout="constrained")
    dtypes = sorted({dtype for _, _, dtype in keys})
    for y, which in enumerate(keys):
        color = PALETTE[dtypes.index(which[2]) % len(PALETTE)]
        values = sorted(lines[which])
        axis.plot(values, [y] * len(values), linestyle="", marker="o", color=color, alpha=0.65)
        middle = statistics.median(values)
        axis.plot([middle], [y], marker="|", markersize=15, markeredgewidth=2.5, color=color)
    axis.axvline(1.0, color="0.2", linewidth=1.2)
    axis.set_yticks(range(len(keys)), [_line_name(k) for k in keys])
    axis.set_ylim(len(keys) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    low = min(min(v) for v in lines.values())
    high = max(max(v) for v in lines.values())
    ticks = [
        x
        for x in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10, 20, 50, 100)
        if low / 1.3 < x < high * 1.3
    ]
    axis.set_xticks(sorted({1, *ticks}))
    axis.set_xlabel("right of 1: we are faster; points are cases, the bar is their median")
    axis.set_title(title, fontsize=12)
    axis.grid(axis="x", alpha=0.3)
    handles = [
        pyplot.Line2D([], [], color=PALETTE[i], marker="o", linestyle="", label=dtype)
        for i, dtype in enumerate(dtypes)
    ]
    axis.legend(handles=handles, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(fig, path)


def _line_name(which: tuple[str, str, str]) -> str:
    suite, direction, dtype = which
    name = suite if suite == direction or suite == "import" else f"{suite} {direction}"
    return name if suite == "import" else f"{name} {dtype}"


def _slug(text: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=DPI)
    pyplot.close(fig)
