"""Runs nvcc and fails where ptxas reports what must not be: spills, or matrix products one by one.

    python check_ptxas.py NVCC ARGUMENTS...

With FUSED_ATTN_PTXAS=warn they are printed and no failure: for an nvcc that nobody has tried.
CMake calls it in front of the compiler. The numbers are ptxas' own: C7508 setmaxnreg is ignored,
C7510 to C7519 wgmma is serialised. What a file took to compile is printed.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

FORBIDDEN = re.compile(r"\(C75(08|1\d)\)|warning.*(spill|local memory)", re.IGNORECASE)
SPILL = re.compile(r"(\d+) bytes spill stores")


def complaints(report: str) -> list[str]:
    """The lines of ptxas' report that are errors here."""
    return [
        line
        for line in report.splitlines()
        if FORBIDDEN.search(line) or any(int(n) > 0 for n in SPILL.findall(line))
    ]


def main() -> int:
    result = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, text=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    kept = [line for line in result.stderr.splitlines() if not line.startswith("ptxas info")]
    kept = [line for line in kept if not re.match(r"\s+\d+ bytes stack frame", line)]
    print("\n".join(kept), end="\n" if kept else "", file=sys.stderr)
    bad = complaints(result.stderr)
    if result.returncode == 0 and bad:
        print("ptxas report (see csrc/cuda/check_ptxas.py):", *bad, sep="\n  ", file=sys.stderr)
        if os.environ.get("FUSED_ATTN_PTXAS") != "warn":
            return 1
    kernels = result.stderr.count("Compiling entry function")
    if kernels:
        source = next(Path(word).name for word in sys.argv if word.endswith(".cu"))
        seconds = used.ru_utime + used.ru_stime
        verdict = f"{len(bad)} complaints" if bad else "none spills"
        print(f"{source}: {kernels} kernels, {verdict}, {seconds:.0f} s of a core")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
