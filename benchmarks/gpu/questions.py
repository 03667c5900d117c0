"""What nobody can know without a GPU, asked in its first minutes; each a process of its own.

The order is that of what a wrong guess would cost: what maps may do, what a norm asks for as widths
grow, a thread that has no context yet, large offsets, and what the compiler's order is worth.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fused_attn
from fused_attn.selftest import long

from ..suites.machine import CHECKOUT
from . import machine, measure

BACKENDS = measure.BACKENDS
DEVICE = "cuda"
NVCC = "/usr/local/cuda/bin"


def map_shift() -> None:
    """Which loads and stores through shifted tensor maps work: `map_shift.cu`."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=NVCC)
    if nvcc is None:
        raise SystemExit("there is no nvcc: the question needs one")
    machine.WORK.mkdir(parents=True, exist_ok=True)
    program = machine.WORK / "map_shift"
    source = Path(__file__).with_name("map_shift.cu")
    target = "-gencode=arch=compute_90a,code=sm_90a"
    subprocess.run([nvcc, "-std=c++17", target, str(source), "-o", str(program)], check=True)
    if code := subprocess.run([str(program)], check=False).returncode:
        raise SystemExit(code)


def answer(questions: dict[str, Callable[[], str]]) -> None:
    """Print an answer to each; fail where one is an error."""
    wrong = False
    for name, ask in questions.items():
        try:
            said = ask()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, it is the answer
            wrong, said = True, f"{type(error).__name__}: {error}"
        print(f"{name:<28} {said}", flush=True)
    if wrong:
        raise SystemExit(1)


def norm_widths() -> None:
    """Whether the backward still starts when a wider row asks for more shared memory."""

    def at(backend: str, width: int) -> str:
        x, weight = (torch.randn(*size, device=DEVICE, requires_grad=True)
                     for size in ((64, width), (width,)))  # fmt: skip
        found, wanted = (
            torch.autograd.grad(
                fused_attn.layer_norm(x, (width,), weight, backend=name).sin().sum(), (x, weight)
            )
            for name in (backend, "reference")
        )
        for mine, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
        return "right"

    answer({
        f"norm backward {backend} {width}": lambda b=backend, w=width: at(b, w)  # type: ignore
        for backend in BACKENDS for width in (256, 768, 1024, 4096, 8192)
    })  # fmt: skip


def cold_thread() -> None:
    """Whether a forward works that is the first thing its thread does on the GPU."""
    q = torch.randn(2, 4, 300, 64, device=DEVICE, dtype=torch.bfloat16)
    wanted = fused_attn.attention(q, q, q, causal=True, backend="reference")

    def on_a_thread(backend: str) -> str:
        found: list[Tensor | Exception] = []

        def run() -> None:
            try:
                found.append(fused_attn.attention(q, q, q, causal=True, backend=backend))
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        torch.testing.assert_close(found[0], wanted, rtol=2e-2, atol=2e-2)
        return "right"

    answer({f"cold thread {b}": lambda b=b: on_a_thread(b) for b in BACKENDS})  # type: ignore


def packed_64k() -> None:
    """Whether attention over 64k tokens is right whose q, k and v are slices of one tensor."""

    def run(backend: str, window: int | None) -> str:
        long.check(backend, DEVICE, torch.bfloat16, window)
        return "right"

    answer({
        f"64k tokens {backend} {'full' if window is None else f'window {window}'}":
            lambda b=backend, w=window: run(b, w)  # type: ignore
        for backend in BACKENDS for window in (512, None)
    })  # fmt: skip


def overlap() -> None:
    """The forward's speed with its exponentials beside the product and behind it, by turns.

    The second order is a module of its own (`_C_late` in csrc/cuda/cuda.cmake), in a copy of the
    package. Beside both stands what the model says of them.
    """
    built = Path(fused_attn.__file__).parent
    folders = {"beside the product": built.parent}
    if late := late_module():
        folders["behind it"] = with_module(late, machine.WORK / "late")
    else:
        print("behind it: there is no _C_late in the build folder")
    for _ in range(2):
        for name, folder in folders.items():
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            command = [sys.executable, "-m", "benchmarks.gpu.forward_speed", name]
            subprocess.run(command, cwd=folder, env=environment, check=True)


def late_module() -> Path | None:
    """Where the build left the other module, if it did."""
    return next(iter((CHECKOUT / "build").glob("cmake-*/late/_C*")), None)


def with_module(module: Path, folder: Path) -> Path:
    """A checkout of links in which the package has this module."""
    package = folder / "fused_attn"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    (folder / "benchmarks").symlink_to(CHECKOUT / "benchmarks")
    for path in Path(fused_attn.__file__).parent.iterdir():
        if not path.name.startswith("_C."):
            (package / path.name).symlink_to(path)
    (package / module.name).symlink_to(module)
    return folder
