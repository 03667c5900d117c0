"""Builds fused_attn._C with CMake and ninja; pyproject.toml says everything else.

FUSED_ATTN_NATIVE=auto (default): build it where there is a C++ compiler, else install without it.
FUSED_ATTN_NATIVE=on: no compiler is an error. FUSED_ATTN_NATIVE=off: install without it.
FUSED_ATTN_CUDA=auto|on|off: the CUDA kernels, likewise. FUSED_ATTN_CUDA_ARCHS: what for (80;90a).
FUSED_ATTN_CUDA_TRAP=1: they trap after a second in an mbarrier, for debugging.
FUSED_ATTN_CUDA_LATE_EXP=1: a second module in the build folder, which `make gpu` compares with.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LATE_EXP = "FUSED_ATTN_CUDA_LATE_EXP"
ADVICE = (
    "To install fused_attn without its compiled part (the reference and Triton backends still "
    "work), set FUSED_ATTN_NATIVE=off."
)


def build_wanted() -> bool:
    """Whether to build the compiled module, from FUSED_ATTN_NATIVE and the compilers at hand."""
    choice = os.environ.get("FUSED_ATTN_NATIVE", "auto")
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"FUSED_ATTN_NATIVE must be auto, on or off, got {choice!r}")
    if choice == "off":
        return False
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = named[:1] or ["c++", "g++", "clang++", "cl"]
    if any(shutil.which(candidate) for candidate in candidates):
        return True
    message = f"No C++ compiler found (looked for {', '.join(candidates)})."
    if choice == "on":
        raise SystemExit(f"{message} {ADVICE}")
    print(f"{message} Installing without the compiled part, as FUSED_ATTN_NATIVE=off does.")
    return False


class CMakeBuild(build_ext):
    """Runs CMake in a build folder that is kept, so that the next build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit(f"CMake was not found, and fused_attn._C is built with it. {ADVICE}")
        import pybind11

        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DFUSED_ATTN_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if "FUSED_ATTN_CUDA_ARCHS" in os.environ:
            configure.append(f"-DFUSED_ATTN_CUDA_ARCHS={os.environ['FUSED_ATTN_CUDA_ARCHS']}")
        for option in ("FUSED_ATTN_CUDA_TRAP", LATE_EXP):
            configure.append(f"-D{option}={os.environ.get(option, '0')}")
        ninja = shutil.which("ninja")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        build = [cmake, "--build", str(folder), "--config", "Release"]
        if ninja is None:
            build += ["--parallel", str(os.cpu_count())]
        start = time.monotonic()
        self._make(configure, build, folder)
        print(f"fused_attn._C took {time.monotonic() - start:.0f} s to build")

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        made = [path for path in folder.rglob(f"_C*{target.suffix}") if path.is_file()]
        [built] = [path for path in made if path.parent.name != "late"]
        # Replaced in one step: a process may have the old module mapped.
        staged = target.with_suffix(".new")
        shutil.copy2(built, staged)
        staged.replace(target)

    def _make(self, configure: list[str], build: list[str], folder: Path) -> None:
        """Configure and build; with FUSED_ATTN_CUDA=auto a second time, without CUDA, if need be.

        CUDA can fail after CMake took it to be there: a compiler that takes no host compiler of
        this machine, a toolkit without its headers.
        """
        cuda = os.environ.get("FUSED_ATTN_CUDA", "auto")
        chosen = (f"-DFUSED_ATTN_CUDA={cuda}", "-DFUSED_ATTN_CUDA_FAILURE=")
        error = self._try(configure, build, folder, *chosen)
        if error is not None and cuda == "auto":
            print("Building again without the CUDA kernels. FUSED_ATTN_CUDA=on stops instead.")
            reason = "the build with CUDA failed (FUSED_ATTN_CUDA=on shows why)"
            without = ("-DFUSED_ATTN_CUDA=off", f"-DFUSED_ATTN_CUDA_FAILURE={reason}")
            error = self._try(configure, build, folder, *without)
        if error is not None:
            raise SystemExit(
                f"Building fused_attn._C failed: see the messages above. {ADVICE}"
            ) from error

    def _try(
        self, configure: list[str], build: list[str], folder: Path, *options: str
    ) -> subprocess.CalledProcessError | None:
        """What failed, if anything did."""
        try:
            subprocess.run([*configure, *options], check=True)
        except subprocess.CalledProcessError as error:
            # What CMake remembers of this machine (a broken compiler, say) must not last.
            shutil.rmtree(folder, ignore_errors=True)
            return error
        if os.environ.get(LATE_EXP, "0") != "0":  # beside the other; without it nothing is lost
            subprocess.run([*build, "--target", "_C", "_C_late"], check=False)
        try:
            subprocess.run([*build, "--target", "_C"], check=True)
        except subprocess.CalledProcessError as error:
            return error
        return None


setup(
    ext_modules=[Extension("fused_attn._C", sources=[])] if build_wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
