"""Files that are kept for the user: what was found out about this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME/fused_attn, or ~/.cache/fused_attn."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fused_attn"


def write(path: Path, text: str) -> None:
    """Write a file whole: another process sees the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".new", delete=False
    ) as file:
        staged = Path(file.name)
        try:
            file.write(text)
            file.close()
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
