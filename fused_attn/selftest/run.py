"""Starts the workers, watches the clock, prints a table and keeps the record."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import dispatch
from ..ops.operations import OPERATIONS, Operation
from ..runtime import native, verified
from . import report
from .cases import DTYPES, FULL, QUICK, SAMPLE, cases
from .report import Finding

# Seconds without a word from a worker: the first case of a kind may compile for a while.
PATIENCE = 120.0
MOST_DEATHS = 2  # of one operation and backend; then its other cases are not tried
LEVEL = "FUSED_ATTN_CPU"


@dataclass(frozen=True)
class Variant:
    """How the kernels of a CPU are run.

    Attributes:
        how: which cases, as for `cases`.
        level: of instructions; the best there is if None.
        threads: how many; torch's own number if 0.
    """

    how: str
    level: str | None = None
    threads: int = 0

    def __str__(self) -> str:
        """As the table has it: nothing for what a call gets by default."""
        words = [self.level or "", f"{self.threads} thread" if self.threads else ""]
        return " ".join(word for word in words if word)


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
    path = None
    show = report.Progress(sys.stderr, quiet=options.json)
    for operation, backend in able(torch.device(device)):
        for variant in variants(backend.NAME, QUICK if options.quick else FULL):
            show.begin(operation.name, backend.NAME, str(variant))
            for finding in examine(operation.name, backend.NAME, device, variant):
                findings.append(finding)
                show.step(finding)
        path = record(findings, device)  # who is stopped now has lost the others alone
    show.end()
    if options.json:
        print(json.dumps({"device": device, "findings": findings, "record": str(path or "")}))
    else:
        print(report.table(findings))
        print(f"{len(findings)} cases on {device} in {time.monotonic() - start:.0f} s")
        if path is not None:
            print(f"recorded in {path}")
    bad = [f for f in findings if f["status"] in report.BAD]
    return 1 if bad or not findings else 0


def able(device: torch.device) -> Iterator[tuple[Operation, Any]]:
    """Operations and the backends that could run them here, by name at least; not the formula."""
    for operation in OPERATIONS:
        for backend in operation.backends:
            # A GPU's backend on a CPU is a stand-in for tests (an emulator, an interpreter).
            stand_in = device.type == "cpu" and hasattr(backend, "slower")
            if dispatch.is_formula(backend) or stand_in:
                continue
            reasons = [
                dispatch.why_not(backend, operation.smallest(device, dtype))
                for dtype in DTYPES.values()
            ]
            if not all(reasons):
                yield operation, backend


def variants(backend: str, how: str) -> tuple[Variant, ...]:
    """As a call runs by default; on a CPU a sample at each other level, too, and on one thread."""
    found = [Variant(how)]
    if backend == "cpu":
        best = native.module().cpu_level()
        levels = [x for x in native.module().available_cpu_levels() if x != best]
        found += [Variant(SAMPLE, level=level) for level in levels]
        if torch.get_num_threads() > 1:
            found.append(Variant(SAMPLE, threads=1))
    return tuple(found)


def examine(operation: str, backend: str, device: str, variant: Variant) -> Iterator[Finding]:
    """The findings of one operation and backend; a worker that dies or hangs is started anew."""
    count = len(list(cases(operation, variant.how)))
    who = {"operation": operation, "backend": backend, "variant": str(variant)}
    done, deaths = 0, 0
    while done < count and deaths < MOST_DEATHS:
        begun: Finding | None = None
        for told in work(operation, backend, device, variant, done):
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
            yield {**who, **told}
    if done < count:
        left = {"case": f"{count - done} more", "dtype": "", "size": 0, "number": done}
        why = f"not tried: {deaths} cases ended their process"
        yield {**who, **left, "status": "left out", "why": why}


def work(
    operation: str, backend: str, device: str, variant: Variant, skip: int
) -> Iterator[Finding]:
    """What a worker tells, and last of all how it ended if it did not end well."""
    command = [sys.executable, "-m", f"{__package__}.worker", operation, backend, device,
               variant.how, str(variant.threads), str(skip)]  # fmt: skip
    environment = {**os.environ, **({LEVEL: variant.level} if variant.level else {})}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    """Keep what passed on this kind of machine; of a CPU, how it runs by default."""
    index = (torch.device(device).index or 0) if torch.device(device).type == "cuda" else None
    here = verified.machine(index)
    if index is None:
        findings = [f for f in findings if not f["variant"]]
    return verified.write(here, verified.Record(frozenset(passed(findings)), speed(findings)))


def passed(findings: list[Finding]) -> set[str]:
    """Keys of which every case that says something passed, and at least one does."""
    verdicts: dict[str, list[bool]] = {}
    for finding in findings:
        if finding["status"] in ("refused", "skipped", "timed"):
            continue
        if finding["dtype"]:
            keys = [key_of(finding)]
        else:  # nobody knows what the cases left out were
            prefix = f"{finding['operation']} {finding['backend']} "
            keys = [key for key in verdicts if key.startswith(prefix)]
        for key in keys:
            verdicts.setdefault(key, []).append(finding["status"] == "passed")
    return {key for key, results in verdicts.items() if all(results)}


def speed(findings: list[Finding]) -> dict[str, float]:
    """torch's time over ours by key, of what passed."""
    timed = {key_of(f): f["ratio"] for f in findings if f["status"] == "timed"}
    return {key: timed[key] for key in timed.keys() & passed(findings)}


def key_of(finding: Finding) -> str:
    dtype = DTYPES[finding["dtype"]]
    return verified.key(finding["operation"], finding["backend"], dtype, finding["size"])
