"""The command line: `python -m benchmarks {SUITE ...,list,report,compare}`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import machine, passes, peers, report, results, run, shapes, show
from .problem import DTYPES
from .run import Result, Wanted
from .suites import SUITES, find

COMMANDS = ("list", "report", "compare")
PROGRAM = "python -m benchmarks"
PASSES = 3
README = machine.CHECKOUT / "README.md"
HERE = Path("HERE")  # stands for the machine's own folder until the device is known
DESCRIPTION = """Measure us and our peers side by side.

Nothing is timed before its results have passed the error budget against float64; what is wrong,
fails or refuses is reported as that. `list` shows suites, shapes and peers; `report [FOLDER]` draws
pictures of recorded results; `compare A B` finds regressions."""


def main(arguments: list[str]) -> int:
    """Run a command; the exit status is 2 for a wrong call, 1 for what it found."""
    if arguments and arguments[0] in COMMANDS:
        return {"list": _list, "report": _report, "compare": _compare}[arguments[0]](arguments[1:])
    options = _parse(arguments)
    quick = options.quick
    names = [suite.name for suite in SUITES] if "all" in options.suites else options.suites
    wanted = Wanted(options.peers, options.backends, quick, options.rounds, options.passes)
    try:
        problems = [
            (find(name), problem)
            for name in names
            for problem in find(name).problems(
                options.device, options.dtype, options.shapes, quick=quick
            )
        ]
    except shapes.ShapeError as error:
        return _fail(f"--shapes: {error}")
    folder = _folder(options.save, options.device)
    if options.plot is not None and not _can_plot():
        return 2
    rows = _measure(problems, wanted, options.device, folder, options.budget)
    if options.plot is not None:
        target = _folder(options.plot, options.device) or Path()
        shown = results.read(folder) if folder is not None and rows else _as_text(rows)
        report.write(target, shown)
        print(f"report and pictures: {target / 'report.md'}")
    ours = [str(row["status"]) for row in rows if row["ours"] == "yes"]
    bad = [status for status in ours if status.startswith((run.WRONG, run.FAILED))]
    return 0 if run.OK in ours and not bad else 1


def _measure(
    cases: passes.Cases, wanted: Wanted, device: str, folder: Path | None, budget: float
) -> list[dict[str, object]]:
    """Measure, print and record case by case: a run that is stopped has lost nothing."""
    torch.manual_seed(0)
    show.heading(device)
    for name, reason in run.absent(peers.PEERS, wanted).items():
        print(f"  not here: {name:<16} {reason}")
    table, end = show.Table(), time.monotonic() + budget
    found: list[Result] = []

    def record(result: Result, number: int) -> None:
        if folder is not None:
            results.save(folder, result.rows(), device)
        if number == wanted.passes:
            table.add(result)

    _announce(1, wanted.passes, len(cases))
    for result in passes.first(cases, wanted, end):
        found.append(result)
        record(result, 1)
    for number in range(2, wanted.passes + 1):
        if time.monotonic() < end:
            _announce(number, wanted.passes, len(found))
            for i in passes.later(found, wanted, end):
                record(found[i], number)
    for result in found[table.cases :]:  # the time was over before the last pass came to them
        table.add(result)
    if len(found) < len(cases):
        print(f"\nnot measured, {budget:.0f} s are over: {len(cases) - len(found)} cases")
    rows = [row for result in found for row in result.rows()]
    if folder is not None and rows:
        print(f"\nrecorded {len(rows)} rows in {folder}")
    return rows


def _announce(number: int, count: int, cases: int) -> None:
    if count > 1:
        print(f"pass {number} of {count}, {cases} cases", flush=True)


def _as_text(rows: Sequence[dict[str, object]]) -> list[results.Row]:
    facts = machine.environment(str(rows[0]["device"])) if rows else {}
    return [{n: str(row.get(n, "")) for n in results.COLUMNS} | facts for row in rows]


def _parse(arguments: list[str]) -> argparse.Namespace:
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites",
        nargs="+",
        choices=[*names, "all"],
        metavar="SUITE",
        help=f"{', '.join(names)} or all",
    )
    parser.add_argument("--device", type=_device, default=None, help="cpu or cuda")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        default=[],
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)}; default bf16 on a GPU, fp32 bf16 on the CPU",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NAME|SIZES",
        help="named sets or sizes, as `benchmarks list` shows",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        type=_peers,
        default=None,
        metavar="PEER",
        help="only these, or none; default all that are here",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        type=_backends,
        default=None,
        metavar="BACKEND",
        help="only these of our own; default all that can run",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few small shapes, no peers that compile on the CPU"
    )
    parser.add_argument(
        "--rounds", type=_at_least(2), default=None, help="samples a side, of all passes together"
    )
    parser.add_argument(
        "--passes",
        type=_at_least(1),
        default=PASSES,
        help=f"over all cases, so that spreads hold what differs by the minute (default {PASSES})",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="measure nothing later than this; says what was left out",
    )
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=HERE,
        default=None,
        metavar="FOLDER",
        help="record; default benchmarks/results/<machine> in a checkout, else results/<machine>",
    )
    parser.add_argument(
        "--plot",
        nargs="?",
        type=Path,
        const=HERE,
        default=None,
        metavar="FOLDER",
        help="write a report with pictures; default the folder of --save",
    )
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = [DTYPES[name] for name in options.dtype]
    options.peers = None if options.peers is None else tuple(sum(options.peers, ()))
    options.backends = None if options.backends is None else tuple(sum(options.backends, ()))
    if options.plot == HERE and options.save is not None:
        options.plot = options.save
    return options


def _device(name: str) -> str:
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {name!r}")
    if name not in here:
        raise argparse.ArgumentTypeError(f"torch sees no GPU here; devices: {', '.join(here)}")
    return name


def _choices(text: str, known: Sequence[str], nothing: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != nothing)
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"must be {nothing} or of {', '.join(known)}; got {name!r}"
            )
    return names


def _peers(text: str) -> tuple[str, ...]:
    return _choices(text, [peer.name for peer in peers.PEERS], "none")


def _backends(text: str) -> tuple[str, ...]:
    from fused_attn.ops.attention.api import attention_backends

    return _choices(text, attention_backends(), "none")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a number from {least}, got {text!r}")
        return int(text)

    return number


def _folder(wanted: Path | None, device: str) -> Path | None:
    return machine.results_folder(device) if wanted == HERE else wanted


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return 2


def _can_plot() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        _fail("pictures need matplotlib: pip install matplotlib")
        return False
    return True


def _list(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog=f"{PROGRAM} list").parse_args(arguments)
    print(show.catalogue())
    return 0


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} report", description="A Markdown page and pictures of recorded results."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=None,
        help="default: this machine's folder of results",
    )
    parser.add_argument("--output", type=Path, default=None, help="default: the same folder")
    parser.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=README,
        default=None,
        metavar="README.md",
        help="write README's table of all recorded machines between its markers, and nothing else",
    )
    options = parser.parse_args(arguments)
    if options.readme is not None:
        try:
            changed = report.update_readme(options.readme, options.folder)
        except (report.MarkerError, OSError) as error:
            return _fail(str(error))
        print(f"{options.readme}: {'written' if changed else 'up to date'}")
        return _pages_of_the_checkout() if options.readme == README else 0
    if not _can_plot():
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.folder or machine.results_folder(device)
    try:
        rows = results.read(folder)
    except results.ResultsError as error:
        return _fail(str(error))
    output = options.output or (folder if folder.is_dir() else folder.parent)
    report.write(output, rows)
    print(f"report and pictures: {output / 'report.md'}")
    return 0


def _pages_of_the_checkout() -> int:
    """What else is made of the records: README's picture, and the tables of docs/performance.md."""
    from . import levels, summary

    report.update_readme(levels.PAGE)
    for folder, rows in summary.recorded()[:1]:  # the first machine that has figures
        report.put(levels.PAGE, levels.BEGIN, levels.END, levels.table(folder))
        if not _can_plot():
            return 2
        from . import plots

        path = machine.CHECKOUT / "docs" / "images" / "speedup.png"
        plots.draw_summary(path, summary.summary(rows), summary.conditions(rows))
    print(f"{levels.PAGE}: up to date")
    return 0


def _compare(arguments: list[str]) -> int:
    from . import compare

    parser = argparse.ArgumentParser(prog=f"{PROGRAM} compare", description=compare.RULE)
    parser.add_argument("before", type=Path, metavar="A", help="a file or folder of results")
    parser.add_argument("after", type=Path, metavar="B", help="the same, later")
    parser.add_argument(
        "--floor",
        type=float,
        default=compare.FLOOR,
        metavar="SHARE",
        help=f"changes below this share are none (default {compare.FLOOR})",
    )
    options = parser.parse_args(arguments)
    try:
        found = compare.compare(
            results.read(options.before), results.read(options.after), options.floor
        )
    except results.ResultsError as error:
        return _fail(str(error))
    print(found)
    return 1 if found.regressions else 0
