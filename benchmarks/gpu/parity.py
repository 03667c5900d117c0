"""Parity of the Triton kernels on the GPU: every case of the attention and norm tests, on device.

`make gpu` runs it in bfloat16, float16 and float32 against the float64 oracle, twice for equality
bit by bit. `--device cpu` with TRITON_INTERPRET=1 tries the script itself without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from cases import Case, run_backend, run_plain
from test_attention import CASES

from fused_attn.testing import attention_noise, check_against_oracle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Several tiles of every shipped size, and the lengths at which tensor descriptors are used.
LONG = {
    f"long {kind}, head {head_dim}": Case(
        1, 4, 2, 700, 1100, head_dim, causal="lower_right" if kind == "causal" else False
    )
    for kind in ("full", "causal")
    for head_dim in (64, 128, 256)
} | {
    "long everything": Case(
        1, 4, 2, 600, 900, 128, causal="lower_right", window=(500, 0), padding="mask",
        mask="b1qk", bias="1hqk", alibi=True, softcap=5.0, dropout_p=0.1, weights="average",
    ),
    "decoding": Case(2, 8, 2, 1, 4000, 128, padding="lengths"),
}  # fmt: skip


def on_device(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in tensors.items()
    }


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError unless results are within the budget and repeat bit by bit."""
    tensors = on_device(case.tensors(dtype), device)
    check_against_oracle(
        functools.partial(run_backend, case, "triton"),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse", "weights"),
        attention_noise,
    )
    wanted = [x for x in tensors.values() if x.requires_grad]

    def results() -> list[Tensor]:
        outputs = [x for x in run_backend(case, "triton", **tensors) if x is not None]
        return [*outputs, *torch.autograd.grad(outputs[0].sum(), wanted, allow_unused=True)]

    for first, second in zip(results(), results(), strict=True):
        assert first is None or torch.equal(first, second), "two runs differ"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    failures = total = 0
    start = time.perf_counter()
    for name, case in {**CASES, **LONG}.items():
        if options.match not in name:
            continue
        for dtype in options.dtypes:
            total += 1
            try:
                check(case, DTYPES[dtype], options.device)
            except Exception as error:  # one kernel's fault must not hide another's
                failures += 1
                print(f"FAILED {name} {dtype}: {type(error).__name__}: {error}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{total - failures} of {total} cases pass on {options.device}, {seconds:.0f} s")
    return 1 if failures or not total else 0


if __name__ == "__main__":
    sys.exit(main())
