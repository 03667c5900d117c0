"""Which kernels passed their tests on this kind of machine, and how fast: records, as data.

A kernel that never ran on a kind of GPU is not what a user gets there by default: a fault on a GPU
comes late and stays, and a hang has no end. So a call is served by a GPU backend only where a
record says that this build's kernels passed, on a GPU of this compute capability, with a driver of
this major version, this torch and this Triton; for each operation, dtype and class of head sizes.
Where a record says that torch's own functions were faster there, they serve what they can express.
On a CPU everything may run, and a record says how fast products are here. Records lie in the
package (`fused_attn/verified/*.json`) and in the user's cache, and are data: nothing in them is
run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._version import __version__
from . import native, processor, user_files, versions

FORMAT = 2  # 1 had no speed: what it says was measured by an older self-test
PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "verified"
_LARGEST_FILE = 1 << 20  # bytes; a record takes some thousands
# Head sizes that one set of kernels serves: up to each of these.
CLASSES = (64, 128, 256)
NOT_VERIFIED = (
    "not verified on this GPU: run `python -m fused_attn selftest`, or ask for it by name"
)


class Record(NamedTuple):
    """What records say.

    Attributes:
        passed: keys (see `key`) of which every case passed.
        speed: by key, torch's seconds over ours, measured in one run: below 1, torch was faster.
    """

    passed: frozenset[str]
    speed: dict[str, float]


NOTHING = Record(frozenset(), {})


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


def slower(
    operation: str, backend: str, device: torch.device, dtype: torch.dtype, size: int = 0
) -> str | None:
    """Why such calls are better left to torch's own functions; None if nothing says so.

    Args:
        size: the larger head size of an attention; 0 for what has none.
    """
    if device.type != "cuda":
        return None
    return _slower(operation, backend, device.index or 0, dtype, size)


def speed_here(operation: str, backend: str, dtype: torch.dtype, size: int = 0) -> float | None:
    """torch's seconds over a CPU backend's in `selftest` on this processor; None if unknown."""
    return _speed_here(operation, backend, dtype, size)


@functools.lru_cache(maxsize=256)
def _speed_here(operation: str, backend: str, dtype: torch.dtype, size: int) -> float | None:
    return records(None).speed.get(key(operation, backend, dtype, size))


def key(operation: str, backend: str, dtype: torch.dtype, size: int) -> str:
    """What a record lists: "attention cuda bfloat16 128"."""
    kind = next((most for most in CLASSES if size <= most), size) if size else 0
    return f"{operation} {backend} {str(dtype)[6:]} {kind}"


def _why_not(operation: str, backend: str, index: int, dtype: torch.dtype, size: int) -> str | None:
    return _verdicts(operation, backend, index, dtype, size)[0]


def _slower(operation: str, backend: str, index: int, dtype: torch.dtype, size: int) -> str | None:
    return _verdicts(operation, backend, index, dtype, size)[1]


# The compiler cannot trace files. It looks through a cache's wrapper: the mark is on functions.
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
_slower._dynamo_marked_constant = True  # type: ignore[attr-defined]
speed_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _verdicts(
    operation: str, backend: str, index: int, dtype: torch.dtype, size: int
) -> tuple[str | None, str | None]:
    """Why such calls may not run by default, and why they should not."""
    name, record = key(operation, backend, dtype, size), records(index)
    ratio = record.speed.get(name, 1.0)
    slower = f"torch's own was faster here in `selftest`: {ratio:.2f} of its speed"
    return None if name in record.passed else NOT_VERIFIED, slower if ratio < 1.0 else None


def forget() -> None:
    """Read the records anew at the next call."""
    for cached in (_verdicts, _speed_here, records):
        cached.cache_clear()


_warned = False


def warn_once() -> None:
    """Tell who calls on a GPU that our kernels do not serve: once in a process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "fused_attn's kernels have not been verified on this GPU, so torch's own serve: "
            "`python -m fused_attn selftest` verifies them, `fused_attn.explain(...)` tells of a "
            "call",
            stacklevel=2,
        )


@functools.lru_cache(maxsize=64)
def records(index: int | None) -> Record:
    """Everything that records say of a GPU like this, or of the processor if None."""
    return found(machine(index))


def machine(index: int | None) -> dict[str, str]:
    """What a record holds for: a GPU, or the processor if `index` is None."""
    if index is None:
        level = native.level() if native.why_not() is None else "none"
        found = {"build": build(), "processor": processor.name(), "kernels": level}
        return {**found, "torch": torch.__version__}
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


def files() -> list[Path]:
    """The files that may be records: the package's, then the user's."""
    paths: list[Path] = []
    for folder in (SHIPPED, user_folder()):
        with contextlib.suppress(OSError):  # no such folder, or none that may be looked into
            paths += sorted(folder.glob("*.json"))
    return paths


def found(here: dict[str, str]) -> Record:
    """Everything that records say of a machine like this; the user's last word on speed counts."""
    passed: set[str] = set()
    speed: dict[str, float] = {}
    for path in files():
        try:
            record = read(path, here)
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
            continue
        passed |= record.passed
        speed |= record.speed
    return Record(frozenset(passed), speed)


def read(path: Path, here: dict[str, str]) -> Record:
    """A record; NOTHING if it is of another machine or build.

    Raises:
        OSError, ValueError: it cannot be read, or is no record.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError("it is too large for a record")
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is no record in format {FORMAT}")
    keys, speed = content.get("passed"), content.get("speed")
    if not isinstance(keys, list) or not all(isinstance(each, str) for each in keys):
        raise ValueError("it lists nothing that passed")
    if not isinstance(speed, dict) or not all(map(_is_ratio, speed.values())):
        raise ValueError("its speed is no positive number for each key")
    if not set(speed) <= set(keys):
        raise ValueError("it has the speed of what did not pass")
    if content.get("machine") != here:
        return NOTHING
    return Record(frozenset(keys), {name: float(ratio) for name, ratio in speed.items()})


def _is_ratio(value: object) -> bool:
    """A number that one time over another can be."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 1e-6 < value < 1e6  # type: ignore[operator]


def write(here: dict[str, str], record: Record, folder: Path | None = None) -> Path | None:
    """Keep what was found on a machine; None, with a warning, where nothing can be written."""
    folder = user_folder() if folder is None else folder
    name = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.json"
    content = {
        "format": FORMAT,
        "machine": here,
        "passed": sorted(record.passed),
        "speed": {key: round(record.speed[key], 4) for key in sorted(record.speed)},
    }
    text = json.dumps(content, indent=1)
    try:
        user_files.write(path, text)
    except OSError as error:
        warnings.warn(f"the record cannot be kept in {path}: {error}", stacklevel=2)
        return None
    forget()
    return path
