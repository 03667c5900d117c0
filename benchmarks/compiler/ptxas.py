"""Triton's own ptxas against another one: the same kernels, compiled and run under both.

    python -m benchmarks.compiler.ptxas [--other PATH] [--only code results] [--arch 90] [--match .]

Some versions of ptxas reuse registers that a running wgmma still reads (Triton's wheels of 2025
bring such a version). `code` compiles the shipped kernels under both, which takes no GPU, and lists
what needs other registers or spills, and what touches registers in flight. `results` runs the
parity cases under both: a case that is right under one only is a fault of the compiler; results
whose bits differ are listed too, they need not be one.

The other ptxas is `--other`, else TRITON_PTXAS_PATH, else the one of the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
TOOLKIT = "/usr/local/cuda/bin"
RANDOM_CASES = 60


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one ptxas made of one thing, a kernel or a parity case."""

    fault: str  # empty if it is right
    facts: str  # registers and spills, or a digest of the results

    @classmethod
    def of(cls, row: dict[str, str]) -> Finding:
        return cls(row["fault"], row["facts"])


def find_other(asked: str | None) -> Path | None:
    """The ptxas to compare with; None if there is none.

    Raises:
        SystemExit: the one that is asked for does not exist.
    """
    named = asked or os.environ.get("TRITON_PTXAS_PATH")
    if named is not None:
        if not os.access(named, os.X_OK):
            raise SystemExit(f"there is no ptxas at {named}")
        return Path(named)
    found = shutil.which("ptxas") or shutil.which("ptxas", path=TOOLKIT)
    return None if found is None else Path(found)


def environment(ptxas: Path | None, cache: str) -> dict[str, str]:
    """For a process that compiles with `ptxas` into `cache`; None: Triton's own, its own cache."""
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if ptxas is None:
        return variables
    return {**variables, **dict.fromkeys(VARIABLES, str(ptxas)), "TRITON_CACHE_DIR": cache}


def version_of(ptxas: Path) -> str:
    done = subprocess.run([str(ptxas), "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["unknown version"])[-1]


def run_under(
    ptxas: Path | None, part: str, options: argparse.Namespace
) -> Iterator[tuple[str, Finding]]:
    """What comes out under one ptxas, by kernel or case, as it comes; None is Triton's own.

    Triton's own reads and fills the cache that is in use, the other one has a cache for itself.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.compiler.ptxas", "--child", part]
        command += ["--arch", str(options.arch), "--match", options.match]
        command += ["--device", options.device]
        variables = environment(ptxas, cache)
        if part == "code":
            variables.pop("TRITON_INTERPRET", None)
        count = 0
        with subprocess.Popen(
            command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    count += 1
                    yield row["name"], Finding.of(row)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed with {process.returncode} after {count}")


def compare(name: str, own: Finding | None, other: Finding | None) -> str:
    """What there is to say of one kernel or case; "" if it is right and the same under both."""
    if own is None or other is None:
        return f"{name}: only under {'the other' if own is None else 'the own'}"
    if own.fault != other.fault:
        return f"{name}: own: {own.fault or 'right'}; other: {other.fault or 'right'}"
    if own.fault:
        return f"{name}: both: {own.fault}"
    if own.facts != other.facts:
        return f"{name}: own: {own.facts}; other: {other.facts}"
    return ""


def compare_all(other: Path, part: str, options: argparse.Namespace) -> bool:
    """Compare a part and say each difference when it is found; True if nothing is at fault."""
    own, lines = {}, 0
    for name, finding in run_under(None, part, options):
        own[name] = finding
        if finding.fault:
            print(f"  {name}: own: {finding.fault}", flush=True)
    left, right = dict(own), bool(own)
    for name, finding in run_under(other, part, options):
        line = compare(name, left.pop(name, None), finding)
        lines += bool(line)
        right &= name in own and not own[name].fault and not finding.fault
        print(f"  {line}\n" if line else "", end="", flush=True)
    for name, finding in left.items():
        print(f"  {compare(name, finding, None)}", flush=True)
    print(f"{part}: {len(own)} compared, {lines + len(left)} differ or are wrong", flush=True)
    return right and not left


def kernels(arch: int, match: str) -> Iterator[tuple[str, Finding]]:
    """The shipped kernels as this process compiles them."""
    from tests.cases.sass_hazards import hazards

    from . import triton_report

    calls = triton_report.all_calls(arch, False)
    calls = {name: call for name, call in calls.items() if match in name}
    for kernel, compiled in triton_report.kernels(arch, calls):
        code = triton_report.disassemble(compiled.asm["cubin"])[1]
        found = hazards(code)[1]
        fault = f"registers touched in flight: {found[:3]}" if found else ""
        facts = f"{kernel.registers} registers, {kernel.stack} bytes of stack, "
        facts += f"{code.count(';')} instructions"
        yield f"{kernel.call}: {kernel.kernel}", Finding(fault, facts)


def cases(device: str, match: str) -> Iterator[tuple[str, Finding]]:
    """The parity cases as this process runs them."""
    import torch

    from ..gpu import checks

    named = {**checks.LONG, **checks.CASES}
    named |= {f"random {seed}": checks.random_case(seed)[0] for seed in range(RANDOM_CASES)}
    for name, case in named.items():
        if match not in name:
            continue
        for dtype in (torch.float16, torch.float32, torch.bfloat16):
            finding = _finding(case, dtype, device)
            if finding is not None:
                yield f"{name}, {dtype}", finding


def _finding(case: Any, dtype: Any, device: str) -> Finding | None:
    """None if Triton does not serve the case."""
    import pytest
    import torch

    from ..gpu import checks

    try:
        demands = checks.Demands(device, repeats=1, backward=True)
        checks.check_attention(case, dtype, "triton", demands)
    except pytest.skip.Exception:
        return None
    except Exception as error:  # one case's fault must not hide another's
        return Finding(f"{type(error).__name__}: {str(error)[:200]}", "")
    tensors = checks.on_device(case.tensors(dtype), device)
    outputs = [x for x in checks.run_backend(case, "triton", **tensors) if x is not None]
    wanted = [x for x in tensors.values() if x.requires_grad]
    grads = torch.autograd.grad(outputs[0].sum(), wanted, allow_unused=True)
    digest = hashlib.sha256()
    for x in (*outputs, *grads):
        if x is not None:
            digest.update(x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return Finding("", digest.hexdigest()[:16])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", help="the ptxas to compare with")
    parser.add_argument("--only", nargs="+", choices=("code", "results"))
    parser.add_argument("--arch", type=int, default=90, help="what `code` is compiled for")
    parser.add_argument("--match", default="", help="only calls or cases whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", choices=("code", "results"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        found = (
            kernels(options.arch, options.match)
            if options.child == "code"
            else cases(options.device, options.match)
        )
        for name, finding in found:
            print(json.dumps({"name": name, **dataclasses.asdict(finding)}), flush=True)
        return 0
    other = find_other(options.other)
    if other is None:
        print("there is no other ptxas than Triton's: nothing to compare")
        return 0
    print(f"other: {other}, {version_of(other)}")
    parts = options.only or ("code", "results")
    right = all([compare_all(other, part, options) for part in parts])
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
