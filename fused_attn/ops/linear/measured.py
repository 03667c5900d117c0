"""Where ours was measured to be faster than torch's product; everywhere else torch's runs.

The figures are in docs/benchmarks.md, "The products around attention".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import autocast, processor
from .problem import LinearProblem

# What a processor needs for torch's products of a dtype to have instructions of their own. Without
# them torch takes 3 to 35 times as long as ours, which converts to float32 on the way.
_DOT_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_tile", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_SMALLEST = 1 << 16  # multiply-adds

_autocast_enabled = torch._C._is_any_autocast_enabled


def is_never_ours(x: Tensor) -> bool:
    """True where no product with x can be ours, without a look at anything else."""
    ours = x.dtype in _DOT_PRODUCTS and x.is_cpu
    return not ours and not (_autocast_enabled() and autocast.enabled(x.device))


def why_torch(problem: LinearProblem) -> str | None:
    """Why torch's product is taken for `problem`; None if ours is the faster one."""
    if "dropout_rng" in problem.operands:
        return None  # torch has no such dropout, and the formula's takes longer than the product
    if problem.dtype not in _DOT_PRODUCTS:
        return f"torch's product of {problem.dtype} is at the limit of the processor already"
    if processor.vendor() not in ("amd", "intel"):
        return "nobody has measured on this processor"
    if processor.has(*_DOT_PRODUCTS[problem.dtype]):
        return f"torch's product has this processor's instructions for {problem.dtype}"
    if problem.rows * problem.width_in * problem.width_out < _SMALLEST:
        return "the product is too small to gain from ours"
    return None
