"""Parity of a GPU backend on the device: the tests' attention and norm cases, and longer ones.

    python -m benchmarks.gpu.parity BACKEND [--dtypes ...] [--match TEXT] [--device cpu]

Results and gradients are held against the float64 oracle, and twice against each other, bit by bit.
`--device cpu`, with TRITON_INTERPRET=1 or FUSED_ATTN_EMULATOR, tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import norm_cases
from cases import Case, run_backend, run_plain, skip_unless_supported
from test_attention import CASES
from test_attention_fuzz import random_case

from fused_attn.testing import attention_noise, check_against_oracle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANDOM_CASES = 300

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
NORM_SHAPES = ((5, 1), (9, 65), (33, 100), (64, 1024), (50, 4096), (20, 8192), (3, 20000))


def on_device(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in tensors.items()
    }


def check_attention(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """Raise AssertionError unless results are within the budget and repeat bit by bit."""
    tensors = on_device(case.tensors(dtype), device)
    skip_unless_supported(case, backend, tensors)
    check_against_oracle(
        functools.partial(run_backend, case, backend),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse", "weights"),
        attention_noise,
    )
    wanted = [x for x in tensors.values() if x.requires_grad]

    def results() -> list[Tensor]:
        outputs = [x for x in run_backend(case, backend, **tensors) if x is not None]
        return [*outputs, *torch.autograd.grad(outputs[0].sum(), wanted, allow_unused=True)]

    for first, second in zip(results(), results(), strict=True):
        assert first is None or torch.equal(first, second), "two runs differ"


def check_norm(case: norm_cases.Case, backend: str, device: str) -> None:
    with torch.device(device):
        case.check(backend)


def attention_checks(backend: str, device: str) -> Iterator[tuple[str, Callable[..., None]]]:
    for name, case in {**CASES, **LONG}.items():
        yield name, lambda dtype, case=case: check_attention(case, dtype, backend, device)
    for seed in range(RANDOM_CASES):
        case, _ = random_case(seed)
        yield (
            f"random {seed}",
            lambda dtype, case=case: check_attention(case, dtype, backend, device),
        )


def norm_checks(backend: str, device: str) -> Iterator[tuple[str, Callable[..., None]]]:
    for shape in NORM_SHAPES:
        for residual, dropout_p in ((None, 0.0), ("post", 0.2), ("pre", 0.0)):
            case = norm_cases.Case(shape, residual=residual, dropout_p=dropout_p)
            yield (
                f"norm {shape} {residual}",
                lambda dtype, case=case: check_norm(
                    dataclasses.replace(case, dtype=dtype), backend, device
                ),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    passed = failed = skipped = 0
    start = time.perf_counter()
    checks = (
        *attention_checks(options.backend, options.device),
        *norm_checks(options.backend, options.device),
    )
    for name, check in checks:
        if options.match not in name:
            continue
        for dtype in options.dtypes:
            try:
                check(DTYPES[dtype])
                passed += 1
            except pytest.skip.Exception:
                skipped += 1
            except Exception as error:  # one kernel's fault must not hide another's
                failed += 1
                print(f"FAILED {name} {dtype}: {type(error).__name__}: {error}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{passed} passed, {failed} failed, {skipped} not supported, {seconds:.0f} s")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
