"""Checks in a process of their own: one that hangs or dies is named, and the rest goes on.

A worker takes check after check, so that it starts once; when it hangs in one or dies of it, the
next check gets a new worker.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Outcome:
    """How a check ended: "passed", "skipped", "failed", "hung" or "died", and what it said."""

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
    names: Iterable[str], command: tuple[str, ...], limit: float, budget: float
) -> Iterator[Outcome]:
    """Outcomes of the checks `names`, one by one, by workers started as `command`.

    Args:
        limit: seconds for one check.
        budget: seconds for all: what is not begun by then has no outcome.
    """
    end = time.monotonic() + budget
    worker = None
    for name in names:
        if time.monotonic() >= end:
            break
        if worker is None:
            worker = _Worker(command)
            refusal = _await_start(worker)
            if refusal is not None:
                yield Outcome(name, *refusal)
                worker = None
                continue
        try:
            worker.ask(name)
            answer = worker.answer(limit)
        except queue.Empty:
            worker.stop()
            worker = None
            yield Outcome(name, "hung", f"killed after {limit:.0f} s")
            continue
        except BrokenPipeError:
            answer = None
        if answer is None:
            yield Outcome(name, "died", f"exit code {worker.code()}")
            worker = None
            continue
        kind, text = answer
        yield Outcome(name, kind, text)
    if worker is not None:
        worker.stop()


def _await_start(worker: _Worker) -> tuple[str, str] | None:
    try:
        if worker.answer(START_LIMIT) == READY:
            return None
    except queue.Empty:
        worker.stop()
        return "hung", f"the worker did not start within {START_LIMIT:.0f} s"
    return "died", f"the worker did not start: exit code {worker.code()}"
