"""Where ours was measured to be faster than torch's product; everywhere else torch's runs.

The figures are in docs/benchmarks.md, "The products around attention"; where `selftest` has run on
this machine, what it measured counts in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import autocast, processor, verified
from .problem import LinearProblem

# What a processor needs for torch's products of a dtype to have instructions of their own. Without
# them torch takes 3 to 35 times as long as ours, which converts to float32 on the way.
_DOT_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_tile", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_SMALLEST = 1 << 16  # multiply-adds
_DOUBT = 0.1  # nearer to 1 than this, a ratio of `selftest` may be chance

_autocast_enabled = torch._C._is_any_autocast_enabled


def is_never_ours(x: Tensor) -> bool:
    """True where no product with x can be ours, without a look at anything else."""
    ours = x.is_cpu and (x.dtype in _DOT_PRODUCTS or _float32_was_faster(x.dtype))
    return not ours and not (_autocast_enabled() and autocast.enabled(x.device))


def _float32_was_faster(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and any(
        (verified.speed_here("linear", "cpu", dtype, size) or 0.0) > 1.0 + _DOUBT
        for size in (0, 64)
    )


def how() -> str:
    """Whose figures decide here."""
    found = {
        f"{str(dtype)[6:]} {ratio:.2f} x torch{' (up to 64 rows)' if size else ''}"
        for dtype in (torch.float32, *_DOT_PRODUCTS) for size in (0, 64)
        if (ratio := verified.speed_here("linear", "cpu", dtype, size)) is not None
    }  # fmt: skip
    return "measured by selftest: " + ", ".join(sorted(found)) if found else "by shipped figures"


def why_torch(problem: LinearProblem) -> str | None:
    """Why torch's product is taken for `problem`; None if ours is the faster one."""
    if "dropout_rng" in problem.operands:
        return None  # torch has no such dropout, and the formula's takes longer than the product
    if problem.rows * problem.width_in * problem.width_out < _SMALLEST:
        return "the product is too small to gain from ours"
    recorded = verified.speed_here("linear", "cpu", problem.dtype, problem.size)
    if recorded is not None and abs(recorded - 1.0) > _DOUBT:
        faster = f"torch's own was faster here in `selftest`: {recorded:.2f} of its speed"
        return faster if recorded < 1.0 else None
    if problem.dtype not in _DOT_PRODUCTS:
        return f"torch's product of {problem.dtype} is at the limit of the processor already"
    if processor.vendor() not in ("amd", "intel"):
        return "nobody has measured on this processor"
    if processor.has(*_DOT_PRODUCTS[problem.dtype]):
        return f"torch's product has this processor's instructions for {problem.dtype}"
    return None
