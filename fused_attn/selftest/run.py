"""Starts the workers, watches the clock, prints a table and keeps the record."""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..ops import dispatch
from ..ops.operations import OPERATIONS, Operation
from ..runtime import verified
from .cases import DTYPES, cases

# Seconds without a word from a worker: the first case of a kind may compile for a while.
PATIENCE = 120.0
MOST_DEATHS = 2  # of one operation and backend; then its other cases are not tried

Finding = dict[str, Any]


def main(arguments: list[str]) -> int:
    """The command; exit status 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m fused_attn selftest", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, under three minutes")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    parser.add_argument("--json", action="store_true", help="findings as JSON on standard output")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a GPU that torch can use")
    start = time.monotonic()
    findings: list[Finding] = []
    show = Progress(sys.stderr, quiet=options.json)
    for operation, backend in able(torch.device(device)):
        show.begin(operation.name, backend.NAME)
        for finding in examine(operation.name, backend.NAME, device, options.quick):
            findings.append(finding)
            show.step(finding)
    show.end()
    path = record(findings, device)
    bad = [f for f in findings if f["status"] not in ("passed", "refused")]
    if options.json:
        print(json.dumps({"device": device, "findings": findings, "record": str(path or "")}))
    else:
        print(table(findings))
        print(f"{len(findings)} cases on {device} in {time.monotonic() - start:.0f} s")
        if path is not None:
            print(f"recorded what passed in {path}")
    return 1 if bad or not findings else 0


def able(device: torch.device) -> Iterator[tuple[Operation, Any]]:
    """Operations and the backends that could run them here, by name at least; not the formula."""
    for operation in OPERATIONS:
        for backend in operation.backends:
            if dispatch.is_formula(backend):
                continue
            reasons = [
                dispatch.why_not(backend, operation.smallest(device, dtype))
                for dtype in DTYPES.values()
            ]
            if not all(reasons):
                yield operation, backend


def examine(operation: str, backend: str, device: str, quick: bool) -> Iterator[Finding]:
    """The findings of one operation and backend; a worker that dies or hangs is started anew."""
    count = len(list(cases(operation, quick)))
    done, deaths = 0, 0
    while done < count and deaths < MOST_DEATHS:
        begun: Finding | None = None
        for told in work(operation, backend, device, quick, done):
            if told["status"] == "started":
                begun = told
                continue
            if told["status"] in ("died", "hung"):
                told = {
                    **(begun or {"number": done, "case": "start", "dtype": "", "size": 0}),
                    **told,
                }
                deaths += 1
            begun, done = None, told["number"] + 1
            yield {"operation": operation, "backend": backend, **told}
    if done < count:
        left = {"case": f"{count - done} more", "dtype": "", "size": 0, "number": done}
        why = f"not tried: {deaths} cases ended their process"
        yield {"operation": operation, "backend": backend, **left, "status": "left out", "why": why}


def work(operation: str, backend: str, device: str, quick: bool, skip: int) -> Iterator[Finding]:
    """What a worker tells, and last of all how it ended if it did not end well."""
    how = "quick" if quick else "full"
    command = [sys.executable, "-m", f"{__package__}.worker", operation, backend, device, how]
    process = subprocess.Popen(
        [*command, str(skip)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    threads = [
        threading.Thread(target=_pass_on, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_pass_on, args=(process.stderr, errors.append), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while True:
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                yield {"status": "hung", "why": f"said nothing for {PATIENCE:.0f} s"}
                return
            if line is None:
                break
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait() != 0:
            threads[1].join(timeout=5)
            said = [line.strip() for line in errors if line and line.strip()]
            yield {
                "status": "died",
                "why": f"exit {process.returncode}: {' '.join(said[-1:])}"[:300],
            }
    finally:
        process.kill()
        process.wait()


def _pass_on(stream: Any, take: Any) -> None:
    for line in stream:
        take(line)
    take(None)


def record(findings: list[Finding], device: str) -> Any:
    """Keep what passed on this kind of GPU; on a CPU there is nothing to keep."""
    if torch.device(device).type != "cuda":
        return None
    here = verified.machine(torch.device(device).index or 0)
    return verified.write(here, passed(findings))


def passed(findings: list[Finding]) -> set[str]:
    """Keys of which every case that was not refused passed."""
    verdicts: dict[str, list[bool]] = {}
    for finding in findings:
        if finding["status"] == "refused":
            continue
        if finding["dtype"]:
            keys = [key_of(finding)]
        else:  # nobody knows what the cases left out were
            prefix = f"{finding['operation']} {finding['backend']} "
            keys = [key for key in verdicts if key.startswith(prefix)]
        for key in keys:
            verdicts.setdefault(key, []).append(finding["status"] == "passed")
    return {key for key, results in verdicts.items() if all(results)}


def key_of(finding: Finding) -> str:
    dtype = DTYPES[finding["dtype"]]
    return verified.key(finding["operation"], finding["backend"], dtype, finding["size"])


def table(findings: list[Finding]) -> str:
    """A line for each operation, backend and dtype, and one for each case that did not pass."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for f in findings:
        rows.setdefault((f["operation"], f["backend"], f["dtype"]), []).append(f["status"])
    lines = [f"{'operation':<16} {'backend':<10} {'dtype':<9} {'passed':>6} {'of':>4}"]
    for (operation, backend, dtype), statuses in rows.items():
        tried = [status for status in statuses if status != "refused"]
        if tried:
            good = tried.count("passed")
            lines.append(f"{operation:<16} {backend:<10} {dtype:<9} {good:>6} {len(tried):>4}")
    for f in findings:
        if f["status"] not in ("passed", "refused"):
            what = f"{f['operation']} {f['backend']} {f['dtype']}: {f['case']}"
            lines.append(f"{f['status'].upper()} {what}: {f.get('why', '')}")
    return "\n".join(lines)


class Progress:
    """A line that says what is being tried."""

    def __init__(self, stream: Any, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet or not stream.isatty()
        self._count, self._who = 0, ""

    def begin(self, operation: str, backend: str) -> None:
        self._who = f"{operation} {backend}"

    def step(self, finding: Finding) -> None:
        self._count += 1
        if not self._quiet:
            line = f"{self._count:>4} {self._who} {finding['dtype']} {finding['case']}"
            self._stream.write(f"\r{line[:78]:<78}")
            self._stream.flush()

    def end(self) -> None:
        if not self._quiet:
            self._stream.write("\r" + " " * 78 + "\r")
