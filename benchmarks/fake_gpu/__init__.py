"""A GPU that is not there: Triton's own launcher over a stand-in for libcuda, tensors on the CPU.

Kernels are compiled for sm_90 as ever, and nothing runs. What it serves for is the way of a call on
the host: how long it takes, and what reaches the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ARCH = 90
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4}
BYTES |= {"u64": 8, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
_MAP_BYTES = 128
_SCRATCH = [8, 8]  # two pointers after the kernel's own arguments


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("bytes", ctypes.c_int),
        ("parameters", ctypes.c_char * 8192),
    )


class Launch(NamedTuple):
    """What reached the driver."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int | None  # None for the default one
    function: int
    parameters: bytes


def why_not() -> str | None:
    """Why there can be none in this process."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET=1: nothing is launched"
    return why_not_installed()


def why_not_installed() -> str | None:
    """Why there can be none on this machine."""
    if shutil.which("gcc") is None:
        return "there is no gcc to compile the stand-in for libcuda"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    missing = [name for name in ("cuda.h",) if not (_include() / name).is_file()]
    del triton
    return "Triton came without cuda.h" if missing else None


def _include() -> Path:
    from triton.backends import nvidia

    return Path(nvidia.__path__[0]) / "include"


class FakeGpu:
    """One H200 as far as Triton's driver and this package can see."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._folder = Path(tempfile.mkdtemp(prefix="fake-libcuda-"))
        library = self._folder / "libcuda.so.1"
        source = Path(__file__).parent / "cuda.c"
        name = "-Wl,-soname,libcuda.so.1"
        command = ["gcc", "-O2", "-shared", "-fPIC", name, f"-I{_include()}", str(source)]
        subprocess.run([*command, "-o", str(library)], check=True)
        self.cuda = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.cuda.fake_launch.restype = ctypes.POINTER(_Launch)
        self.cuda.fake_launches.restype = self.cuda.fake_questions.restype = ctypes.c_long
        self.device, self.stream = 0, 0
        self._target = GPUTarget("cuda", ARCH, 32)
        before = os.environ.get("TRITON_LIBCUDA_PATH")
        os.environ["TRITON_LIBCUDA_PATH"] = str(self._folder)
        try:
            from triton.backends.nvidia import driver

            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
        finally:
            if before is None:
                del os.environ["TRITON_LIBCUDA_PATH"]
            else:
                os.environ["TRITON_LIBCUDA_PATH"] = before

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        return self._target

    def launches(self) -> int:
        """How many launches there were so far."""
        return int(self.cuda.fake_launches())

    def questions(self) -> int:
        """How often the driver was asked about a pointer, or for a tensor map, so far."""
        return int(self.cuda.fake_questions())

    def describe(self, function: int, sizes: list[int]) -> None:
        """Keep what reaches launches of a function (a small number); sizes of its parameters."""
        self.cuda.fake_describe(function, len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def taken(self) -> list[Launch]:
        """What has been kept since the last time."""
        found = []
        for number in range(self.cuda.fake_kept()):
            it = self.cuda.fake_launch(number).contents
            raw = ctypes.string_at(ctypes.addressof(it) + _Launch.parameters.offset, it.bytes)
            function = it.function or 0
            found.append(
                Launch(tuple(it.grid), tuple(it.block), it.shared, it.stream, function, raw)
            )
        self.cuda.fake_forget()
        return found


@contextlib.contextmanager
def standing_in() -> Iterator[FakeGpu]:
    """Within this, Triton's backends take CPU tensors for tensors on an H200."""
    from triton.runtime import driver

    from fused_attn.runtime.triton import device as triton_device

    gpu, before = FakeGpu(), driver._active
    driver.set_active(gpu)
    stand_ins = {
        "why_not": lambda device: [],
        "arch": lambda device: ARCH,
        "shared_memory": lambda device: 232448,
        "multiprocessors": lambda device: 132,
    }
    try:
        with mock.patch.multiple(triton_device, **stand_ins):
            yield gpu
    finally:
        driver._active = before
