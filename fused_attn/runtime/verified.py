"""Which GPU kernels passed their tests on this kind of GPU: records, read and written as data.

A kernel that never ran on a kind of GPU is not what a user gets there by default: a fault on a
GPU comes late and stays, and a hang has no end. So a call is served by a GPU backend only where a
record says that this build's kernels passed, on a GPU of this compute capability, with a driver
of this major version, this torch and this Triton; for each operation, dtype and class of head
sizes. Records lie in the package (`fused_attn/verified/*.json`) and in the user's cache, and are
data: nothing in them is run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from . import user_files, versions

FORMAT = 1
PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "verified"
_LARGEST_FILE = 1 << 20  # bytes; a record takes some thousands
# Head sizes that one set of kernels serves: up to each of these.
CLASSES = (64, 128, 256)


def why_not(
    operation: str, backend: str, device: torch.device, dtype: torch.dtype, size: int = 0
) -> str | None:
    """Why `backend` must not serve such calls unless it is asked for by name; None if it may.

    Args:
        size: the larger head size of an attention; 0 for what has none.
    """
    if device.type != "cuda":
        return None
    return _why_not(operation, backend, device.index or 0, dtype, size)


def key(operation: str, backend: str, dtype: torch.dtype, size: int) -> str:
    """What a record lists: "attention cuda bfloat16 128"."""
    kind = next((most for most in CLASSES if size <= most), size) if size else 0
    return f"{operation} {backend} {str(dtype)[6:]} {kind}"


@functools.lru_cache(maxsize=4096)
def _why_not(operation: str, backend: str, index: int, dtype: torch.dtype, size: int) -> str | None:
    if key(operation, backend, dtype, size) in passed(machine(index)):
        return None
    return "not verified on this GPU: run `python -m fused_attn selftest`, or ask for it by name"


# The compiler cannot trace files.
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def machine(index: int) -> dict[str, str]:
    """What a record holds for."""
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "build": build(),
        "capability": f"{major}.{minor}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": versions.installed("triton") or "none",
    }


@functools.cache
def build() -> str:
    """A digest of the kernels: of the compiled module and of Triton's sources."""
    digest = hashlib.sha256(__version__.encode())
    for pattern in ("_C*", "ops/*/triton/*.py", "runtime/triton/*.py"):
        for path in sorted(PACKAGE.glob(pattern)):
            if path.suffix in (".so", ".pyd", ".py"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """Major version of the driver, as "13"."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(torch.version.hip) if ask is None or torch.version.hip else str(ask() // 1000)


def user_folder() -> Path:
    """Where the records of this user's machine lie."""
    return user_files.folder() / "verified"


def passed(here: dict[str, str]) -> frozenset[str]:
    """Everything that records say of a machine like this."""
    found: set[str] = set()
    for folder in (SHIPPED, user_folder()):
        try:
            paths = sorted(folder.glob("*.json"))
        except OSError:  # no such folder, or none that may be looked into
            continue
        for path in paths:
            try:
                found |= read(path, here)
            except (OSError, ValueError, RecursionError) as error:
                warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
    return frozenset(found)


def read(path: Path, here: dict[str, str]) -> set[str]:
    """The keys of a record; none if it is of another machine or build.

    Raises:
        OSError, ValueError: it cannot be read, or is no record.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError("it is too large for a record")
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is no record in format {FORMAT}")
    keys = content.get("passed")
    if not isinstance(keys, list) or not all(isinstance(each, str) for each in keys):
        raise ValueError("it lists nothing that passed")
    return set(keys) if content.get("machine") == here else set()


def write(here: dict[str, str], keys: set[str], folder: Path | None = None) -> Path | None:
    """Record what passed on a machine; None, with a warning, where nothing can be written."""
    folder = user_folder() if folder is None else folder
    name = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.json"
    text = json.dumps({"format": FORMAT, "machine": here, "passed": sorted(keys)}, indent=1)
    try:
        user_files.write(path, text)
    except OSError as error:
        warnings.warn(f"the record cannot be kept in {path}: {error}", stacklevel=2)
        return None
    _why_not.cache_clear()
    return path
