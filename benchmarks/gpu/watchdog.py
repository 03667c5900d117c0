"""Checks in a process of their own: one that hangs or dies is named, and the rest goes on.

A worker takes check after check, so that it starts once; when it hangs in one or dies of it, the
next check gets a new worker. Where that happens twice in a family of checks, the others of it would
only take the time: they are left out.
"""

from __future__ import annotations

import collections
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

START_LIMIT = 120.0  # seconds for a worker to import everything and reach the device
READY = "ready"
MOST_DEATHS = 2  # of a family of checks
LEFT_OUT = "left out"


@dataclass(frozen=True)
class Outcome:
    """How a check ended: "passed", "skipped", "failed", "hung", "died", LEFT_OUT; what it said."""

    name: str
    kind: str
    text: str = ""


def work(names: Iterable[str], check: Callable[[str], tuple[str, str]]) -> None:
    """The worker: an answer for each name, (kind, text) by `check`; prints go to stderr."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps(READY), file=answers, flush=True)
    for name in names:
        print(json.dumps(check(name.rstrip("\n"))), file=answers, flush=True)


class _Worker:
    def __init__(self, command: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def answer(self, limit: float) -> tuple[str, str] | str | None:
        """The next answer; None if the worker ended instead. Raises queue.Empty after `limit`."""
        line = self._answers.get(timeout=limit)
        return None if line is None else json.loads(line)

    def ask(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()

    def stop(self) -> int:
        """Kill it if need be; its exit code."""
        self._process.kill()
        return self._process.wait()

    def code(self) -> int:
        return self._process.wait()


def supervise(
    names: Iterable[str],
    command: tuple[str, ...],
    limit: float,
    budget: float,
    workers: int = 1,
    family: Callable[[str], str] = lambda name: name,
) -> Iterator[Outcome]:
    """Outcomes of the checks `names`, as they come, by workers started as `command`.

    Args:
        limit: seconds for one check.
        budget: seconds for all: what is not begun by then has no outcome.
        workers: how many there are at a time.
        family: of a check; after MOST_DEATHS hangs and deaths in one, its other checks are left
            out.
    """
    team = _Team(names, command, limit, time.monotonic() + budget, family)
    try:
        yield from team.outcomes(workers)
    finally:
        team.stop()


class _Team:
    """Workers, each with a thread that hands it checks and waits for what it says."""

    def __init__(
        self,
        names: Iterable[str],
        command: tuple[str, ...],
        limit: float,
        end: float,
        family: Callable[[str], str],
    ) -> None:
        self._names, self._command, self._limit, self._end = iter(names), command, limit, end
        self._family = family
        self._deaths: collections.Counter[str] = collections.Counter()
        self._found: queue.Queue[Outcome | None] = queue.Queue()
        self._lock = threading.Lock()
        self._stopped = False

    def outcomes(self, workers: int) -> Iterator[Outcome]:
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()
        left = workers
        while left:
            outcome = self._found.get()
            if outcome is None:
                left -= 1
            else:
                yield outcome

    def stop(self) -> None:
        self._stopped = True

    def _work(self) -> None:
        worker: _Worker | None = None
        try:
            while (name := self._next()) is not None:
                if self._deaths[self._family(name)] >= MOST_DEATHS:
                    why = f"{MOST_DEATHS} of {self._family(name)} hung or died"
                    self._found.put(Outcome(name, LEFT_OUT, why))
                    continue
                worker, outcome = self._check(worker, name)
                if outcome.kind in ("hung", "died"):
                    self._deaths[self._family(name)] += 1
                self._found.put(outcome)
        finally:
            if worker is not None:
                worker.stop()
            self._found.put(None)

    def _next(self) -> str | None:
        with self._lock:
            if self._stopped or time.monotonic() >= self._end:
                return None
            return next(self._names, None)

    def _check(self, worker: _Worker | None, name: str) -> tuple[_Worker | None, Outcome]:
        """The worker that is still there afterwards, and what came of the check."""
        if worker is None:
            worker = _Worker(self._command)
            refusal = _await_start(worker)
            if refusal is not None:
                return None, Outcome(name, *refusal)
        try:
            worker.ask(name)
            answer = worker.answer(self._limit)
        except queue.Empty:
            worker.stop()
            return None, Outcome(name, "hung", f"killed after {self._limit:.0f} s")
        except BrokenPipeError:
            answer = None
        if answer is None:
            return None, Outcome(name, "died", f"exit code {worker.code()}")
        kind, text = answer
        return worker, Outcome(name, kind, text)


def _await_start(worker: _Worker) -> tuple[str, str] | None:
    try:
        if worker.answer(START_LIMIT) == READY:
            return None
    except queue.Empty:
        worker.stop()
        return "hung", f"the worker did not start within {START_LIMIT:.0f} s"
    return "died", f"the worker did not start: exit code {worker.code()}"
