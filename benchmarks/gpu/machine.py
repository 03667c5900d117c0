"""Which GPU this is, and where its results go."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..suites import machine

WORK = machine.CHECKOUT / "build" / "gpu"  # is kept between stages, and no part of a checkout


def why_not() -> str | None:
    """Why there is nothing to measure here; None if there is."""
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    return None


def working_folder(stage: int) -> Path:
    """Where a stage writes."""
    return WORK / f"{machine.folder_name('cuda')}-stage-{stage}"


def name_in_checkout() -> str:
    """Where the results of this GPU belong in a checkout."""
    return f"benchmarks/results/{machine.folder_name('cuda')}"


def describe() -> dict[str, Any]:
    """What every row of the suites has, and what a GPU has besides."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "multiprocessors": properties.multi_processor_count,
        "clocks": _clocks(),
        **machine.environment("cuda"),
    }


def write(folder: Path) -> None:
    (folder / "machine.json").write_text(json.dumps(describe(), indent=2) + "\n")


def _clocks() -> str:
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
