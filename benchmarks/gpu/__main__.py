"""`make gpu STAGE=1|2|3`: build on this machine, prove the kernels on the card, measure, one table.

    python -m benchmarks.gpu --stage 1 [--only PART ...] [--results FOLDER] [--list]

1 builds, asks what nobody could know without a GPU, and holds every kernel against float64 once;
2 measures against peers; 3 runs sanitizers, determinism, graphs, tuning. Each stage builds if it
has to and is useful alone. Each part is a process of its own with a time limit: one that hangs or
fails is reported, and the next one runs. Nothing is fetched from anywhere. What there is at any
moment, whether the stage ends well or is killed, lies in one archive, FOLDER/<gpu>-stage-N.tar.gz;
unpacked at the root of a checkout, it puts results into `benchmarks/results/<gpu>/`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import machine, parts, stage, table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=parts.STAGES, default=1)
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts of the stage")
    parser.add_argument("--results", type=Path, help="where the archive goes; default: build/gpu")
    parser.add_argument("--budget", type=float, default=parts.LIMIT, help="seconds for everything")
    parser.add_argument("--list", action="store_true", help="show the parts of every stage")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    if options.part:
        work = parts.find(options.part).work
        assert callable(work)
        work()
        return 0
    chosen = parts.of_stage(options.stage)
    if options.only:
        unknown = set(options.only) - {part.name for part in chosen}
        if unknown:
            names = ", ".join(part.name for part in chosen)
            parser.error(f"--only: stage {options.stage} has {names}, got {', '.join(unknown)}")
        chosen = tuple(part for part in chosen if part.name in options.only)
    reason = machine.why_not()
    if reason is not None:
        print(f"make gpu: {reason}")
        return 1
    return run(options.stage, chosen, options.results, options.budget)


def run(number: int, chosen: tuple[parts.Part, ...], results: Path | None, budget: float) -> int:
    """A stage; 0 if all that counts went well."""
    end = time.monotonic() + budget
    folder = machine.working_folder(number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(machine.WORK / "triton-cache"))
    archive = (results or machine.WORK).resolve() / f"{folder.name}.tar.gz"
    record = stage.Record(number, folder, archive, machine.name_in_checkout())
    record.archive()
    machine.write(folder)
    finished = stage.run_all(chosen, record, folder, end - time.monotonic())
    text = table.render(folder, record.outcomes)
    (folder / f"stage-{number}.txt").write_text(text + "\n")
    record.archive()
    print(text)
    print(f"results: {archive}")
    judged = {part.name for part in chosen if not part.advisory}
    fine = all(record.outcomes.get(name) == "ok" for name in judged)
    return 0 if finished and fine else 1


def listing() -> str:
    """Every stage's parts with the seconds that each may take."""
    lines = []
    for number in parts.STAGES:
        own = parts.of_stage(number)
        lines.append(f"stage {number}, at most {sum(part.limit for part in own)} s")
        lines += [f"  {part.name:<20}{part.limit:>5} s" for part in own]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
