"""Measurements: `python -m benchmarks` for the suites, cpu_gates.py, gpu/, compiler/."""

import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _prefer_what_is_built() -> None:
    """A checkout that nothing was built in must not hide the package that is installed."""
    if "fused_attn" in sys.modules or any((ROOT / "fused_attn").glob("_C.*")):
        return
    before = sys.path[:]
    sys.path[:] = [folder for folder in before if Path(folder or ".").resolve() != ROOT]
    try:
        with contextlib.suppress(ModuleNotFoundError):
            import fused_attn  # noqa: F401
    finally:
        sys.path[:] = before


_prefer_what_is_built()
