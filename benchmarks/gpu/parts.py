"""What `make gpu` runs: one list, in order, with the seconds that each part may take.

A stage is the parts that name it. Each stage builds, is useful alone and, since its limits add up
to less, ends within 9 minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from . import measure, questions

STAGES = (1, 2, 3)
LIMIT = 530  # seconds that the limits of a stage may add up to


@dataclass(frozen=True)
class Part:
    """One step, a process of its own.

    Attributes:
        stages: those that it is a part of.
        limit: seconds that it may take.
        work: its command, or a function, which `python -m benchmarks.gpu --part NAME` calls.
        environment: variables that it gets besides those that are set.
        advisory: failing, it is shown and does not count.
        shown: what it says is shown whether it fails or not.
    """

    name: str
    stages: tuple[int, ...]
    limit: int
    work: tuple[str, ...] | Callable[[], None]
    environment: tuple[tuple[str, str], ...] = ()
    advisory: bool = False
    shown: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        if callable(self.work):
            return (sys.executable, "-m", "benchmarks.gpu", "--part", self.name)
        return self.work


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def parity(*arguments: str) -> tuple[str, ...]:
    return module("benchmarks.gpu.parity", *arguments)


def compiling(jobs: int, *arguments: str) -> tuple[str, ...]:
    return module("benchmarks.gpu.compile", "--jobs", str(jobs), *arguments)


SANITIZED = ("--match", "small", "--dtypes", "bf16")


def sanitizer(tool: str, *arguments: str) -> tuple[str, ...]:
    """The small checks in one process; what Triton's kernels are made of is in its cache by now."""
    checks = parity(*arguments, *SANITIZED, "--in-process", "--repeats", "1", "--no-compiling")
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *checks)


BUILD = (
    ("FUSED_ATTN_NATIVE", "on"),
    ("FUSED_ATTN_CUDA", "on"),
    ("FUSED_ATTN_CUDA_ARCHS", "80;90a"),
    ("FUSED_ATTN_CUDA_LATE_EXP", "1"),  # the forward with both orders: part `overlap` compares
    ("FUSED_ATTN_PTXAS", "warn"),  # another nvcc may spill where ours does not: slow, not wrong
)
# No record says yet that they passed here: by default torch's own would serve, and be measured.
OURS = (("FUSED_ATTN_BACKENDS", ",".join(measure.BACKENDS)),)
# Else the allocator's own blocks hide what is read past the end of a tensor.
NO_CACHING = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
WATCHED = ("--workers", "4", "--case-limit", "15")

# The most telling first: what the time does not reach is left out, and said to be.
PARTS = (
    # Stage 1. It comes before the build, which it does not need.
    Part("map-shift", (1,), 40, questions.map_shift, shown=True),
    Part("build", STAGES, 150, (sys.executable, "setup.py", "build_ext", "--inplace"), BUILD),
    Part("info", (1,), 15, module("fused_attn", "info")),
    Part("norm-widths", (1,), 25, questions.norm_widths, shown=True),
    Part("cold-thread", (1,), 15, questions.cold_thread, shown=True),
    Part("packed-64k", (1,), 30, questions.packed_64k, shown=True),
    Part("overlap", (1,), 45, questions.overlap, shown=True),
    Part("compile", (1,), 60, compiling(16, "--budget", "55")),
    Part("parity-cuda", (1,), 70, parity("cuda", *WATCHED, "--budget", "62")),
    Part("parity-triton", (1,), 80, parity("triton", *WATCHED, "--budget", "72")),
    # Stage 2.
    Part("compile-measured", (2,), 25,
         compiling(16, "--budget", "22", "--match", "long", "--dtypes", "bf16")),
    Part("ceilings", (2,), 15, measure.ceilings, OURS),
    Part("attention-8k", (2,), 120, measure.attention_8k, OURS),
    Part("attention", (2,), 65, measure.attention, OURS),
    Part("norms", (2,), 45, measure.norms, OURS),
    Part("masks", (2,), 45, measure.masks, OURS),
    Part("decode", (2,), 25, measure.decode, OURS),
    Part("modules", (2,), 40, measure.modules, OURS),
    # Stage 3. Compiling under a sanitizer would take longer than the checks.
    Part("compile-checked", (3,), 25, compiling(16, "--budget", "22", *SANITIZED)),
    Part("memcheck", (3,), 60, sanitizer("memcheck", "cuda", "triton"), NO_CACHING),
    # Its reports on copies that no tensor map describes, the backward's row statistics, are false:
    # the forward is judged here, the backward's log is to be read.
    Part("racecheck", (3,), 30, sanitizer("racecheck", "cuda", "--forward-only")),
    Part("launches", (3,), 35,
         module("pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_kernels.py"), OURS),
    Part("repeat", (3,), 35,
         parity("cuda", "triton", "--match", "long", "--modes", "deterministic", "--dtypes", "bf16",
                "--repeats", "20", "--budget", "28")),
    Part("deterministic", (3,), 40, measure.deterministic, OURS),
    Part("overhead", (3,), 45, measure.overhead, OURS),
    Part("tuning", (3,), 40, measure.tuning, OURS, shown=True),
    Part("ptxas", (3,), 45,
         module("benchmarks.compiler.ptxas", "--only", "results", "--match", "long full")),
    Part("racecheck-backward", (3,), 25, sanitizer("racecheck", "cuda"), advisory=True),
)  # fmt: skip


def of_stage(stage: int) -> tuple[Part, ...]:
    return tuple(part for part in PARTS if stage in part.stages)


def find(name: str) -> Part:
    [part] = [part for part in PARTS if part.name == name]
    return part
