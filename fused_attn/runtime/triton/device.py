"""What every Triton backend needs: whether Triton can run here, which GPU it is, and launching.

Nothing here imports Triton before somebody asks on behalf of a GPU tensor. With TRITON_INTERPRET=1
Triton executes kernels in Python on CPU tensors; that is for tests, so a backend that runs this way
is taken only when it is asked for by name (`only_by_name`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import recording

BACKEND = "triton"  # what the backends here are called

# What the tests have compiled; a later Triton may run too, but nobody has looked.
TESTED_VERSIONS = ((3, 5), (3, 7))
OLDEST_ARCH = 80
INTERPRETER, AMD = 0, 1  # stand for an architecture where there is no compute capability
AMD_SHARED_MEMORY = 64 << 10  # the LDS of a workgroup up to gfx942

_compile_only: _CompileOnly | None = None


def compiling() -> _CompileOnly | None:
    """What stands in for the launches, if anything does."""
    return _compile_only


def _foreign() -> int | None:
    """The architecture that is being compiled for in place of the one that is there."""
    if _compile_only is None or _compile_only.arch is None:
        return None
    return AMD if isinstance(_compile_only.arch, str) else _compile_only.arch


def interpreted() -> bool:
    """True if Triton executes kernels in Python instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(device: torch.device) -> list[str]:
    """Reasons why no Triton kernel can run on tensors on `device`."""
    if _foreign() is not None:
        return []
    if device.type == "cpu" and not interpreted():
        return [f"needs tensors on a GPU, these are on {device}"]
    if device.type not in ("cpu", "cuda"):
        return [f"needs tensors on an NVIDIA or AMD GPU, these are on {device}"]
    reasons = []
    missing = _triton_reason()
    if missing is not None:
        reasons.append(missing)
    if device.type == "cuda" and not torch.version.hip and arch(device) < OLDEST_ARCH:
        major, minor = divmod(arch(device), 10)
        reasons.append(f"needs compute capability 8.0 or later, {device} has {major}.{minor}")
    return reasons


def _triton_reason() -> str | None:
    return _import_triton()


# The compiler cannot trace an import; see `native.why_not`.
_triton_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _import_triton() -> str | None:
    """Why Triton cannot be used; None if it can."""
    try:
        import triton
    except Exception as error:  # a broken installation raises anything
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    low, high = TESTED_VERSIONS
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not low <= version <= high:
        tested = " to ".join(".".join(map(str, each)) for each in TESTED_VERSIONS)
        return f"Triton {triton.__version__} is outside the tested range {tested}"
    return None


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; AMD or INTERPRETER."""
    foreign = _foreign()
    if foreign is not None:
        return foreign
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return AMD
    return _device_arch(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_shared_memory(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; more than any kernel wants where nobody knows."""
    if _foreign() == AMD:
        return AMD_SHARED_MEMORY
    if _foreign() is not None or device.type != "cuda":
        return 1 << 20
    return _device_shared_memory(
        torch.cuda.current_device() if device.index is None else device.index
    )


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at least; as many as an H200's where there is no GPU."""
    if _foreign() is not None or device.type != "cuda":
        return 132
    return _device_multiprocessors(
        torch.cuda.current_device() if device.index is None else device.index
    )


class Machine(NamedTuple):
    """What a choice of tiles by time holds for."""

    gpu: str
    capability: int  # 90 for 9.0
    triton: str
    kernels: str  # a digest of the kernels' sources

    def file_name(self) -> str:
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu)
        return f"{gpu}-sm{self.capability}-triton{self.triton}-{self.kernels}.json"


@functools.cache
def machine(device: torch.device) -> Machine:
    """The GPU that `device` is, and what runs on it."""
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return Machine(gpu, arch(device), triton.__version__, _kernels_digest())


_tuned_sources: list[Path] = []


def tiles_depend_on(folder: Path) -> None:
    """Say that the choice of tiles holds for the kernels' sources in `folder` as they are now."""
    _tuned_sources.append(folder)


@functools.cache
def _kernels_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for folder in _tuned_sources for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def launch(kernel: Any, programs: int, *args: Any, warps: int, stages: int) -> None:
    """Run `programs` programs of `kernel` on the current stream of the arguments' device.

    Args:
        warps: of 32 threads; where a warp has 64, half as many run.
    """
    if (torch.version.hip or _compile_only is not None) and _lanes() == 64:
        warps = max(1, warps // 2)
    if _compile_only is not None:
        _compile_only.launch(kernel, args, warps, stages)
    elif programs > 0:
        start = time.perf_counter()
        compiled = kernel[(programs,)](*args, num_warps=warps, num_stages=stages)
        notes = recording.current()
        if notes is not None:
            notes.launched(kernel, compiled, programs, args)
        # Triton says which specialisation ran; its interpreter does not.
        key = id(kernel) if compiled is None else id(compiled)
        if key not in _launched:
            _launched.add(key)
            seconds = time.perf_counter() - start
            _logger.info("first launch of %s took %.2f s", kernel.__name__, seconds)


def _lanes() -> int:
    """Threads of a warp."""
    if _compile_only is not None and _compile_only.arch is not None:
        return lanes_of(_compile_only.arch)
    return _device_lanes(torch.cuda.current_device()) if torch.version.hip else 32


def lanes_of(arch: int | str) -> int:
    """Threads of a warp: AMD's data-centre GPUs have 64."""
    return 64 if isinstance(arch, str) and arch.startswith("gfx9") else 32


@functools.cache
def _device_lanes(index: int) -> int:
    return torch.cuda.get_device_properties(index).warp_size


# What has been launched: the first time includes compiling, or reading Triton's cache on disk.
_launched: set[int] = set()
_logger = logging.getLogger(__name__)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing can be timed then, or allocated to stay."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Wanted(NamedTuple):
    """A kernel that a launch would run."""

    kernel: str
    constants: str  # tell it from others of that name in one call
    compile: Callable[[], Any]  # what Triton makes of it


class _CompileOnly(NamedTuple):
    """Stands in for the launches; see `compiling_for`."""

    arch: int | str | None
    on_launch: Callable[[Wanted], None]
    candidate: int | None

    def launch(self, kernel: Any, args: tuple[Any, ...], warps: int, stages: int) -> None:
        """Say what a launch wants."""

        def compile_it() -> Any:
            from triton.runtime import driver

            before = driver.active if torch.cuda.is_available() else None
            if self.arch is not None:
                driver.set_active(_Driver(self.arch))
            try:
                return kernel.warmup(*args, grid=(1,), num_warps=warps, num_stages=stages)
            finally:
                if before is not None:
                    driver.set_active(before)

        constants = f"{args[-1]}, {warps} warps, {stages} stages"
        self.on_launch(Wanted(kernel.__name__, constants, compile_it))


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch: int | str) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        """Compiled kernels are kept by device: no real one has this number."""
        return -(int(self._arch[3:], 16) if isinstance(self._arch, str) else self._arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if isinstance(self._arch, str):
            return GPUTarget("hip", self._arch, lanes_of(self._arch))
        return GPUTarget("cuda", self._arch, 32)


@contextlib.contextmanager
def compiling_for(
    arch: int | str | None, on_launch: Callable[[Wanted], None], candidate: int | None = None
) -> Iterator[None]:
    """Within this, launches run nothing; with an `arch`, tensors may be on "meta".

    Args:
        arch: compute capability, 90 for 9.0, or what AMD calls it, "gfx942"; None for that of the
            GPU that is there.
        on_launch: called with what each launch would run; may compile it.
        candidate: which of the tiles that a kernel may have, 0 for the default; None: the one that
            a launch would take.
    """
    global _compile_only
    before, _compile_only = _compile_only, _CompileOnly(arch, on_launch, candidate)
    try:
        yield
    finally:
        _compile_only = before
