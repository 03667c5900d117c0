"""Machine code of LLVM's assembly, in this process, by llvmlite: no compiler, no files."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import platform
import re
import sys
from typing import Any

from ....runtime import native
from .text import Target

LEAST = (0, 45)  # the first with LLVM 20, whose assembly is written here
INSTALL = 'pip install "fused_attn[jit]"'
# By level of the kernels (csrc/cpu/levels.h): a processor that has what the level allows, and the
# bytes of a vector register.
_PROCESSORS = {
    "avx2": ("x86-64-v3", 32),
    "avx512": ("x86-64-v4", 64),
    "avx512_bf16": ("x86-64-v4", 64),
    "avx512_amx": ("x86-64-v4", 64),
    "neon": ("generic", 16),
}


@functools.cache
def why_not() -> str | None:
    """Why no machine code can be made here, as far as that is known without loading LLVM."""
    if sys.platform != "linux":
        return f"machine code has been tried on Linux alone, this is {sys.platform}"
    version = _version()
    if version is None:
        return f"llvmlite is not installed: {INSTALL}"
    if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < LEAST:
        return f"llvmlite {version} is older than {'.'.join(map(str, LEAST))}: {INSTALL}"
    return None


@functools.cache
def broken() -> str | None:
    """Loads LLVM, once; why it does not work, None if it does."""
    try:
        _started()
    except Exception as error:  # whatever a broken installation raises
        return f"llvmlite {_version()} does not work here: {type(error).__name__}: {error}"
    return None


def _version() -> str | None:
    try:
        return importlib.metadata.version("llvmlite")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _started() -> Any:
    """llvmlite's module, after a function of a line was compiled and called."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    code = Code("define void @strip(ptr %p) {\n store i64 7, ptr %p\n ret void\n}\n", binding)
    number = ctypes.c_int64(0)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address)(ctypes.addressof(number))
    if number.value != 7:
        raise RuntimeError(f"its code gave {number.value}, not 7")
    return binding


def target(wide: bool) -> Target:
    """What code is written for, for kernels of float64 or float32 at the level that they run at.

    `fused` says what the C++ compilers make of `fma()` there: float64 has the portable kernels at
    level avx2.
    """
    level = native.module().cpu_level()
    x86 = "x86" in _machine()
    portable = level == "portable" and x86
    return Target(
        vector_bytes=_PROCESSORS.get(level, ("", 16))[1],
        wide=wide,
        fused=not portable and not (wide and level == "avx2"),
        rounds=not portable,
        halves=not portable,
    )


@functools.cache
def _machine() -> str:
    return platform.machine().lower().replace("amd64", "x86_64")


class Code:
    """The machine code of one module; it goes when this does.

    Attributes:
        address: of `strip`.
    """

    def __init__(self, assembly: str, binding: Any = None) -> None:
        binding = binding or _started()
        processor = _processor()
        module = binding.parse_assembly(assembly)
        module.verify()
        machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
            cpu=processor, features="", opt=2, codemodel="jitdefault", jit=True
        )
        options = binding.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address("strip")


def _processor() -> str:
    level = native.module().cpu_level()
    return _PROCESSORS.get(level, ("x86-64" if "x86" in _machine() else "generic", 16))[0]
