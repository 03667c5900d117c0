"""Running a stage: part after part, and at any moment an archive of what there is so far."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .parts import Part

ROOT = Path(__file__).parents[2]
REFRESH = 10.0  # seconds between two archives while a part runs
LEAST = 10.0  # seconds without which a part is not begun
SHOWN_LINES = 24


class Interrupted(BaseException):
    """Somebody ends the stage."""


class Record:
    """The outcomes of a stage, on disk from the first moment on, and the archive of its folder."""

    def __init__(self, stage: int, folder: Path, archive: Path, within: str) -> None:
        """`within`: what the archive calls the folder."""
        self._folder, self._archive, self._within = folder, archive, within
        self._path = folder / f"stage-{stage}.json"
        self._rows: list[dict[str, Any]] = []
        self._stage = stage

    @property
    def outcomes(self) -> dict[str, str]:
        return {row["part"]: row["outcome"] for row in self._rows}

    def note(self, part: Part, outcome: str, seconds: float = 0.0) -> None:
        """What became of a part so far; the latest word counts."""
        row = {"part": part.name, "limit": part.limit, "outcome": outcome,
               "seconds": round(seconds, 1)}  # fmt: skip
        self._rows = [each for each in self._rows if each["part"] != part.name] + [row]
        _write(self._path, json.dumps({"stage": self._stage, "parts": self._rows}, indent=1) + "\n")
        self.archive()

    def archive(self) -> None:
        """Everything there is by now, in one file that is whole at any moment."""
        self._archive.parent.mkdir(parents=True, exist_ok=True)
        partial = self._archive.with_suffix(".part")
        with tarfile.open(partial, "w:gz") as file:
            for path in sorted(self._folder.rglob("*")):
                if path.is_file() and path.suffix != ".part":
                    file.add(path, f"{self._within}/{path.relative_to(self._folder)}")
        partial.replace(self._archive)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


def run(
    part: Part, folder: Path, limit: float, tick: Callable[[], None] = lambda: None
) -> tuple[str, float]:
    """Run one part; ("ok", "failed (exit code)" or "took longer than ...", seconds).

    Args:
        folder: where its log goes, `logs/NAME.log`, and its results.
        tick: called now and then meanwhile.
    """
    log = folder / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **dict(part.environment), "FUSED_ATTN_RESULTS": str(folder)}
    print(f"[{part.name}] ...", end=" ", flush=True)
    start = time.monotonic()
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            print(outcome := f"{part.command[0]} is not there", flush=True)
            return outcome, 0.0
        try:
            outcome = _wait(process, start + limit, tick)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome = outcome or f"took longer than {limit:.0f} s"
    seconds = time.monotonic() - start
    print(f"{outcome}, {seconds:.0f} s", flush=True)
    if outcome != "ok" or part.shown:
        said = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        print("    " + "\n    ".join(said), flush=True)
    return outcome, seconds


def _wait(process: subprocess.Popen[Any], end: float, tick: Callable[[], None]) -> str | None:
    """How the process ended; None if it has not by then."""
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return None
        try:
            code = process.wait(timeout=min(left, REFRESH))
        except subprocess.TimeoutExpired:
            tick()
            continue
        return "ok" if code == 0 else f"failed ({code})"


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this, SIGTERM and SIGINT are `Interrupted`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(parts: tuple[Part, ...], record: Record, folder: Path, budget: float) -> bool:
    """Run `parts` one after the other; False if somebody ended it before the last."""
    end = time.monotonic() + budget
    begun: Part | None = None
    try:
        with interruptible():
            for part in parts:
                left = end - time.monotonic()
                if left < min(LEAST, part.limit):
                    record.note(part, "no time left")
                    continue
                begun = part
                record.note(part, "running")
                limit = min(part.limit, left)
                outcome, seconds = run(part, folder, limit, record.archive)
                begun = None
                record.note(part, outcome, seconds)
    except Interrupted as why:
        if begun is not None:
            record.note(begun, f"ended by {why}")
        print(f"ended by {why}", flush=True)
        return False
    return True
