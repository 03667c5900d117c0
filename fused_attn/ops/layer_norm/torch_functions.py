"""torch's own norms, wherever they can express the call.

They serve calls on GPUs where our kernels are not verified. A row whose squares leave the range of
numbers (elements beyond 1e19, or below 1e-15 with an eps of 0) gets what torch makes of it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...runtime import higher_order
from .problem import LayerNormProblem, Operands, Options

NAME = "torch"
IS_FORMULA = IS_TORCH = True  # ordinary torch code: whoever traces sees torch's operators
OPERANDS = frozenset(("residual", "weight", "bias"))
GRADIENTS = frozenset(("x", "residual", "weight", "bias"))


def why_not(problem: LayerNormProblem) -> list[str]:
    reasons = []
    for name in ("weight", "bias"):
        dtype = getattr(problem, f"{name}_dtype")
        if dtype not in (None, problem.dtype):
            reasons.append(f"takes `{name}` in {problem.dtype} only, got {dtype}")
    if higher_order.needs_formula() or higher_order.forward_mode():
        reasons.append("leaves transforms and forward-mode derivatives to the formula")
    return reasons


def only_by_name(problem: LayerNormProblem) -> str | None:
    return None if problem.device.type == "cuda" else "our own kernels are faster here"


def detail() -> str:
    """What is not as with the other backends."""
    return "rows beyond 1e19 as torch has them"


def forward(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """y and h = x + residual; autograd differentiates torch's functions to any order."""
    x, residual, weight, bias, _ = operands
    h = x if residual is None else x + residual
    row = h.shape[h.dim() - options.dims :]
    if options.rms:
        y = F.rms_norm(h, row, weight, options.eps)
    else:
        y = F.layer_norm(h, row, weight, bias, options.eps)
    return y.contiguous(), h.contiguous()
