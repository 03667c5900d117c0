"""What a figure is worth nothing without: machine, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from fused_attn import __version__
from fused_attn.runtime import native, versions

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "benchmarks" / "results"


def environment(device: str = "cpu") -> dict[str, str]:
    """Columns of every recorded row."""
    facts = {
        "machine": gpu_name() if device == "cuda" else cpu_name(),
        "cpu_level": cpu_level(),
        "driver": _driver() if device == "cuda" else "",
        "cuda": (torch.version.cuda or "") if device == "cuda" else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if device == "cuda" else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions.installed("triton") or "",
        "fused_attn": __version__,
        "commit": _commit(),
    }
    now = datetime.datetime.now(datetime.timezone.utc)
    return {**facts, "date": now.strftime("%Y-%m-%d %H:%M UTC")}


def cpu_level() -> str:
    """The level of instructions that our CPU kernels run at; "none" without them."""
    return str(native.module().cpu_level()) if native.why_not() is None else "none"


def folder_name(device: str = "cpu") -> str:
    """Name of the machine's folder of results."""
    name = gpu_name() if device == "cuda" else cpu_name()
    name = name.lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def results_folder(device: str = "cpu") -> Path:
    """`benchmarks/results/<machine>` in a checkout, else `results/<machine>` where one stands."""
    root = RESULTS if RESULTS.is_dir() else Path("results")
    return root / folder_name(device)


def repository() -> str:
    """The address that links from outside begin with: `Repository` of pyproject.toml."""
    text = (CHECKOUT / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "([^"]+)"$', text, re.M)
    assert found is not None
    return found[1]


def gpu_name() -> str:
    return torch.cuda.get_device_name()


@functools.cache
def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.processor() or platform.machine())
    family = fields.get("cpu family")
    return f"{name} family {family}" if family else name


@functools.cache
def _commit() -> str:
    """Of the checkout; of a copy without its history what FUSED_ATTN_COMMIT says."""
    if not (CHECKOUT / ".git").exists():
        return os.environ.get("FUSED_ATTN_COMMIT") or "none"
    return _output("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12")


@functools.cache
def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
