"""`python -m fused_attn info`: what is here, which backends can run, and why the others cannot."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from ._version import __version__
from .ops import dispatch
from .ops.linear import measured
from .ops.operations import OPERATIONS
from .runtime import native, verified, versions

ENVIRONMENT = {
    "FUSED_ATTN_EMULATOR": "the built emulator: CUDA kernels on CPU tensors, for tests",
    "FUSED_ATTN_TUNING": "off, read, on: what becomes of tiles that were found to be fastest",
    "FUSED_ATTN_BACKENDS": "backends switched off or on by name: -cuda,triton",
    "FUSED_ATTN_CPU": "instruction-set level of the CPU kernels, for tests",
    "FUSED_ATTN_DEBUG": "1: warn, once a kind, where a call is right and its user likely wrong",
}


def report() -> str:
    """The whole report as text."""
    sections = [_versions(), _native(), _backends(), _records(), _environment()]
    return "\n\n".join(sections)


def _versions() -> str:
    cuda = torch.version.cuda or "none"
    rows = {
        "fused_attn": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__} (CUDA {cuda})",
        "triton": versions.installed("triton") or "not installed",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads for torch",
        "GPU": _gpu(),
    }
    return _table("versions", rows)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _native() -> str:
    reason = native.why_not()
    if reason is not None:
        return _table("compiled part", {"missing": reason})
    module = native.module()
    rows = {"CPU level": f"{module.cpu_level()} (of {', '.join(module.available_cpu_levels())})"}
    if module.cpu_level_left_out():
        rows["CPU level left out"] = (
            f"{module.cpu_level_left_out()}, which this machine has and the one lacked that "
            "compiled this; install again, here or with FUSED_ATTN_CPU_LEVELS=all"
        )
    rows.update({name: str(value) for name, value in module.build_info().items()})
    return _table("compiled part", rows)


def _backends() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = []
    for operation in OPERATIONS:
        smallest = operation.smallest(device, torch.float32)
        explanation = dispatch.explain(operation.backends, smallest)
        by_name = dict(explanation.by_name)
        rows = {
            name: "; ".join(reasons) or _available(by_name.get(name))
            for name, reasons in explanation.reasons
        }
        title = f"{operation.name} backends for tensors on {device.type}"
        sections.append(_table(title, rows))
    return "\n\n".join(sections)


def _available(by_name: str | None) -> str:
    return "available" if by_name is None else f"available by name ({by_name})"


def _records() -> str:
    """What `selftest` left for this kind of GPU; of a CPU, how fast products are."""
    if not torch.cuda.is_available():
        return _table("records of selftest", {"products on the CPU": measured.how()})
    here = verified.machine(0)
    rows = dict(here)
    record = verified.records(0)
    rows["verified"] = ", ".join(sorted(record.passed)) or "nothing: run `fused_attn selftest`"
    slower = [f"{key} ({ratio:.2f})" for key, ratio in sorted(record.speed.items()) if ratio < 1]
    if slower:
        rows["torch is faster at"] = ", ".join(slower)
    others = [path for path in verified.files() if _is_of_another(path, here)]
    if others:
        rows["of other builds"] = ", ".join(str(path) for path in others)
    return _table("records of selftest", rows)


def _is_of_another(path: Path, here: dict[str, str]) -> bool:
    """Whether a record is sound and says nothing here."""
    try:
        return verified.read(path, here) == verified.NOTHING
    except (OSError, ValueError, RecursionError):
        return False  # it was warned of


def _environment() -> str:
    rows = {
        name: f"{os.environ.get(name, 'not set')} ({meaning})"
        for name, meaning in ENVIRONMENT.items()
    }
    return _table("environment variables", rows)


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([title, *lines])
