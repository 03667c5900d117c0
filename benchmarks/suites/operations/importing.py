"""Import time as a problem: what a package costs a process that has torch already."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..problem import Prepared, Problem, Side

CODE = """
import time, torch
start = time.perf_counter()
import {package}
print(time.perf_counter() - start)
"""


@dataclass(frozen=True, kw_only=True)
class Import(Problem):
    """Importing a package, in a fresh process, after torch."""

    operation: ClassVar[str] = "import"

    @property
    def size(self) -> str:
        return "import after torch"

    @property
    def label(self) -> str:
        return self.size

    def columns(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        return ()

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        return [Side("fused_attn", lambda tensors: import_call("fused_attn"))]


def import_call(package: str) -> Prepared:
    """A call that imports `package` in a fresh process and returns the seconds that it took."""
    return Prepared(lambda: seconds(package))


def seconds(package: str) -> float:
    """Seconds of `import package` in a fresh process with torch in it."""
    command = [sys.executable, "-c", CODE.format(package=package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return float(done.stdout.split()[-1])
