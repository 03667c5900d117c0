"""Builds fused_attn._C with CMake and ninja; pyproject.toml says everything else.

FUSED_ATTN_NATIVE=auto (default): build it where there is a C++ compiler, else install without it.
FUSED_ATTN_NATIVE=on: no compiler is an error. FUSED_ATTN_NATIVE=off: install without it.
FUSED_ATTN_CPU_LEVELS=native (default): the CPU kernels for what this machine has; all: for every
machine of its kind, as a wheel for others wants.
FUSED_ATTN_CUDA=auto|on|off: the CUDA kernels, likewise. FUSED_ATTN_CUDA_ARCHS: what for (80;90a).
FUSED_ATTN_CUDA_TRAP=1: they trap after a second in an mbarrier, for debugging.
FUSED_ATTN_CUDA_LATE_EXP=1: a second module in the build folder, which `make gpu` compares with.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LATE_EXP = "FUSED_ATTN_CUDA_LATE_EXP"
WITHOUT = (
    "To install fused_attn without its compiled part (the reference and Triton backends still "
    "work), set FUSED_ATTN_NATIVE=off."
)
OLDEST_SETUPTOOLS = 77  # reads the license of pyproject.toml
OLDEST = {"gcc": (11, 0), "clang": (14, 0)}  # compilers, for C++17 and the levels' flags
COMPILERS = ("c++", "g++", "clang++", "cl")
GET_COMPILER = {
    "Linux": "`apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora, RHEL)",
    "Darwin": "`xcode-select --install`",
    "Windows": 'the Visual Studio Build Tools, with "Desktop development with C++"',
}
GET_TOOLS = (
    "Installed with `--no-build-isolation`? Then `pip install 'setuptools>=77' cmake ninja "
    "'pybind11>=2.13'` first. Without a network the same four come from wheels that were "
    "downloaded elsewhere: `pip download` there, `pip install --no-index --find-links` here."
)


def say(text: str) -> None:
    """Print in order with what the processes that are started print."""
    print(text, flush=True)


def check_platform() -> None:
    """Stop where nothing of the package could be built or run, and say what would help."""
    if int(__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"Building fused_attn needs setuptools {OLDEST_SETUPTOOLS} or later, this is "
            f"{__version__}. {GET_TOOLS}"
        )
    if sys.maxsize < 2**32:
        raise SystemExit(
            "fused_attn needs a 64-bit Python, as torch does, and this one is 32-bit: install a "
            "64-bit Python and make a new environment with it."
        )
    if platform.python_implementation() != "CPython":
        raise SystemExit(
            f"fused_attn needs CPython, as torch does, and this is "
            f"{platform.python_implementation()}: make a new environment with CPython."
        )


def compiler() -> list[str]:
    """The command of the C++ compiler that CMake will take; empty if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else []
    return next(([name] for name in COMPILERS if shutil.which(name)), [])


def too_old(command: list[str]) -> str | None:
    """What to read where a compiler is known to be too old; None if it is not."""
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    text = said.stdout
    if "Apple" in text:  # counts its versions in its own way; torch's needs are above ours
        return None
    kind = "clang" if "clang" in text else "gcc"
    # The version is the last number of the first line, behind what the distribution adds.
    numbers = re.findall(r"\b(\d+)\.(\d+)(?:\.\d+)?\b", text.partition("\n")[0])
    if not numbers or (kind == "gcc" and "Free Software Foundation" not in text):
        return None
    found = (int(numbers[-1][0]), int(numbers[-1][1]))
    if found >= OLDEST[kind]:
        return None
    oldest = ".".join(map(str, OLDEST[kind]))
    return (
        f"The C++ compiler {' '.join(command)} is {kind} {found[0]}.{found[1]}, and fused_attn._C "
        f"needs {kind} {oldest} or later: name a newer one, as in CXX=g++-12."
    )


def build_wanted() -> bool:
    """Whether to build the compiled module, from FUSED_ATTN_NATIVE and the compilers at hand."""
    choice = os.environ.get("FUSED_ATTN_NATIVE", "auto")
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"FUSED_ATTN_NATIVE must be auto, on or off, got {choice!r}")
    if choice == "off":
        return False
    command = compiler()
    if command:
        return True
    looked = os.environ.get("CXX") or ", ".join(COMPILERS)
    get = GET_COMPILER.get(platform.system(), "one that knows C++17")
    message = f"No C++ compiler found (looked for {looked}). To get one: {get}."
    if choice == "on":
        raise SystemExit(f"{message} {WITHOUT}")
    say(
        f"{message} Installing without the compiled part for now, as FUSED_ATTN_NATIVE=off does: "
        "everything works, at the speed of plain PyTorch. Install again once there is one."
    )
    return False


def cpu_levels() -> str:
    choice = os.environ.get("FUSED_ATTN_CPU_LEVELS", "native")
    if choice not in ("native", "all"):
        raise SystemExit(f"FUSED_ATTN_CPU_LEVELS must be native or all, got {choice!r}")
    return choice


class CMakeBuild(build_ext):
    """Runs CMake in a build folder that is kept, so that the next build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        problem = too_old(compiler())
        if problem is not None:
            raise SystemExit(f"{problem} {WITHOUT}")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit(
                f"CMake was not found, and fused_attn._C is built with it. {GET_TOOLS} {WITHOUT}"
            )
        try:
            import pybind11
        except ModuleNotFoundError:
            raise SystemExit(
                f"pybind11 was not found, and fused_attn._C is built with it. {GET_TOOLS} {WITHOUT}"
            ) from None

        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DFUSED_ATTN_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        configure.append(f"-DFUSED_ATTN_CPU_LEVELS={cpu_levels()}")
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
        say(
            f"Compiling fused_attn._C on {os.cpu_count()} cores: four to seven minutes of "
            "processor time, and more with the CUDA kernels (FUSED_ATTN_CUDA=off leaves them out)."
        )
        start = time.monotonic()
        self._make(configure, build, folder)
        say(f"fused_attn._C took {time.monotonic() - start:.0f} s to build")

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
        failed = self._try(configure, build, folder, *chosen)
        if failed is not None and cuda == "auto":
            say("Building again without the CUDA kernels. FUSED_ATTN_CUDA=on stops instead.")
            reason = "the build with CUDA failed (FUSED_ATTN_CUDA=on shows why)"
            without = ("-DFUSED_ATTN_CUDA=off", f"-DFUSED_ATTN_CUDA_FAILURE={reason}")
            failed = self._try(configure, build, folder, *without)
        if failed is not None:
            raise SystemExit(f"Building fused_attn._C failed: {failed}. {WITHOUT}")

    def _try(
        self, configure: list[str], build: list[str], folder: Path, *options: str
    ) -> str | None:
        """What failed, and where to read why; None if nothing did."""
        try:
            subprocess.run([*configure, *options], check=True)
        except subprocess.CalledProcessError:
            return f"CMake found a problem, see its messages above{self._clean(folder)}"
        if os.environ.get(LATE_EXP, "0") != "0":  # beside the other; without it nothing is lost
            subprocess.run([*build, "--target", "_C", "_C_late"], check=False)
        try:
            subprocess.run([*build, "--target", "_C"], check=True)
        except subprocess.CalledProcessError:
            return "the compiler's messages are above"
        return None

    def _clean(self, folder: Path) -> str:
        """Forget what CMake remembers of this machine (a broken compiler, say), but not its log.

        Returns:
            Where the log is that CMake's messages speak of, as the end of a sentence.
        """
        logs = [
            log for name in ("CMakeConfigureLog.yaml", "CMakeError.log")
            if (log := folder / "CMakeFiles" / name).exists()
        ]  # fmt: skip
        kept = folder.with_name("configure.log")
        for log in logs[:1]:
            shutil.copy(log, kept)
        shutil.rmtree(folder, ignore_errors=True)
        return f"; its log is kept in {kept}" if logs else ""


check_platform()
setup(
    ext_modules=[Extension("fused_attn._C", sources=[])] if build_wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
