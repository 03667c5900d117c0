"""What is held against the oracle on a GPU: the tests' attention and norm cases, and longer ones.

Each check can also make the same call of Triton's kernels with tensors that have no memory, which
compiles them. Inputs and results lie between guard bands; what promises to repeat is run again.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from fused_attn.runtime.triton import device as triton_device
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases import layer_norm as norm_cases
from tests.cases.attention import Case, run_backend, run_plain, skip_unless_supported
from tests.ops.attention.test_api import CASES
from tests.ops.attention.test_fuzz import random_case

from .guards import guarded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = {"default": False, "deterministic": True}
RANDOM_CASES = 300
SEEDS = 10  # of the long cases
HEAD_SIZES = (64, 128, 256)  # up to which one set of kernels serves
TRITON = triton_device.BACKEND

# Several tiles of every shipped size, and the lengths at which tensor descriptors are used.
LONG = {
    f"long {kind}, head {head_dim}": Case(
        1, 4, 2, 700, 1100, head_dim, causal="lower_right" if kind == "causal" else False
    )
    for kind in ("full", "causal")
    for head_dim in (64, 96, 128, 192, 256)
} | {
    "long everything": Case(
        1, 4, 2, 600, 900, 128, causal="lower_right", window=(500, 0), padding="mask",
        mask="b1qk", bias="1hqk", alibi=True, softcap=5.0, dropout_p=0.1, weights="average",
    ),
    "decoding": Case(2, 8, 2, 1, 4000, 128, padding="lengths"),
}  # fmt: skip
# For compute-sanitizer, which takes its time: every compiled head size, plain and with operands.
SMALL = {
    f"small {kind}, head {head_dim}": Case(1, 2, 1, 150, 200, head_dim, causal=True, **operands)
    for kind, operands in (
        ("plain", {}),
        ("masks", {"bias": "11qk", "mask": "1hqk", "padding": "holes"}),
    )
    for head_dim in (40, 64, 128, 256)
}
NORM_SHAPES = ((5, 1), (9, 65), (33, 100), (64, 1024), (50, 4096), (20, 8192), (3, 20000))


@dataclasses.dataclass(frozen=True)
class Demands:
    """What is asked of every check."""

    device: str
    repeats: int
    backward: bool


def on_device(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in tensors.items()
    }


def check_attention(case: Case, dtype: torch.dtype, backend: str, demands: Demands) -> None:
    """Raise AssertionError unless results are within the budget and repeat as promised."""
    tensors = on_device(case.tensors(dtype, requires_grad=demands.backward), demands.device)
    skip_unless_supported(case, backend, tensors)
    with guarded() as guards:
        fenced = {name: guards.fenced(x, name) for name, x in tensors.items()}
        check_against_oracle(
            functools.partial(run_backend, case, backend),
            functools.partial(run_plain, case),
            fenced,
            ("out", "lse", "weights"),
            attention_noise,
        )
        first = results(case, backend, fenced)
    for _ in range(demands.repeats - 1):
        for a, b in zip(first, results(case, backend, tensors), strict=True):
            assert a is None or torch.equal(a, b), "two runs differ"


def results(case: Case, backend: str, tensors: dict[str, Tensor]) -> list[Tensor | None]:
    """What must repeat bit by bit: outputs, and gradients of deterministic algorithms."""
    outputs = [x for x in run_backend(case, backend, **tensors) if x is not None]
    wanted = [x for x in tensors.values() if x.requires_grad]
    if not wanted:
        return [*outputs]
    gradients = torch.autograd.grad(outputs[0].sum(), wanted, allow_unused=True)
    return [*outputs, *(gradients if torch.are_deterministic_algorithms_enabled() else ())]


def check_norm(case: norm_cases.Case, dtype: torch.dtype, backend: str, demands: Demands) -> None:
    with torch.device(demands.device):
        dataclasses.replace(case, dtype=dtype).check(backend)


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing to be right.

    Attributes:
        check: raises AssertionError unless it is; takes dtype, backend and demands.
        call: makes the same call of Triton's kernels, with tensors that have no memory.
        modes: of MODES.
        kernels: which of a backend's kernels it runs, without the dtype.
        random: one of the many that are drawn.
    """

    check: Callable[[torch.dtype, str, Demands], None]
    call: Callable[[torch.dtype], None]
    modes: tuple[str, ...]
    kernels: str
    random: bool = False


def attention_check(case: Case, modes: tuple[str, ...], random: bool = False) -> Check:
    size = max(case.head_dim, case.head_dim_v or 0)
    kind = next((str(most) for most in HEAD_SIZES if size <= most), "large")
    check, call = functools.partial(check_attention, case), functools.partial(call_attention, case)
    return Check(check, call, modes, f"attention {kind}", random)


def norm_check(case: norm_cases.Case, modes: tuple[str, ...]) -> Check:
    check, call = functools.partial(check_norm, case), functools.partial(call_norm, case)
    return Check(check, call, modes, "norm")


def call_attention(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward by Triton's kernels, of tensors on "meta"."""
    tensors = on_device(case.tensors(dtype), "meta")
    results(case, TRITON, tensors)


def call_norm(case: norm_cases.Case, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        moved = dataclasses.replace(case, dtype=dtype)
        tensors = moved.tensors()
        outputs = moved.run(TRITON, **tensors)
        grads = [torch.empty_like(x) for x in outputs]
        torch.autograd.grad(outputs, [*tensors.values()], grads, allow_unused=True)


@functools.cache
def all_checks() -> dict[str, Check]:
    """By name, the most telling first."""
    checks: dict[str, Check] = {}
    both = tuple(MODES)
    for name, case in {**LONG, **SMALL, **CASES}.items():
        checks[name] = attention_check(case, both)
    for shape in NORM_SHAPES:
        for residual, dropout_p in ((None, 0.0), ("post", 0.2), ("pre", 0.0)):
            norm = norm_cases.Case(shape, residual=residual, dropout_p=dropout_p)
            checks[f"norm {shape} {residual}"] = norm_check(norm, both[:1])
    for seed in range(1, SEEDS):
        for name, case in LONG.items():
            mode = both[seed % 2 : seed % 2 + 1]
            seeded = attention_check(dataclasses.replace(case, seed=seed), mode, random=True)
            checks[f"{name}, seed {seed}"] = seeded
    for seed in range(RANDOM_CASES):
        mode = both[seed % 2 : seed % 2 + 1]
        checks[f"random {seed}"] = attention_check(random_case(seed)[0], mode, random=True)
    return checks
