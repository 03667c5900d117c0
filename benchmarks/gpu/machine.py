"""Which GPU this is, and where its results go."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fused_attn import __version__

RESULTS = Path(__file__).parents[1] / "results"


def why_not() -> str | None:
    """Why there is nothing to measure here; None if there is."""
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    return None


def results_folder() -> Path:
    """`benchmarks/results/<gpu>/`, made if need be."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe() -> dict[str, Any]:
    """GPU, driver, versions, commit, date: what a figure means nothing without."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "multiprocessors": properties.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw",
                          "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "fused_attn": __version__,
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def write(folder: Path) -> None:
    (folder / "machine.json").write_text(json.dumps(describe(), indent=2) + "\n")


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
