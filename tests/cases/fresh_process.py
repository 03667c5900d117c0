"""Code in a Python process of its own, with nothing of this one's environment but its modules."""

from __future__ import annotations

import subprocess
import sys


def run(code: str, **environment: str) -> str:
    """What `code` prints; fails with what it says if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
