"""torch's own addition and activations, wherever they can express the call.

They serve calls on GPUs where our kernels are not verified. In 16 bits torch rounds between its
functions: after the bias, and after the activation of a gate.
"""

from __future__ import annotations

from torch import Tensor

from ...runtime import higher_order
from ...runtime.activations import activate
from .problem import BiasActivationProblem, Operands, Options

NAME = "torch"
IS_FORMULA = IS_TORCH = True  # ordinary torch code: whoever traces sees torch's operators
OPERANDS = frozenset(("bias",))
GRADIENTS = frozenset(("x", "bias"))


def why_not(problem: BiasActivationProblem) -> list[str]:
    if higher_order.needs_formula() or higher_order.forward_mode():
        return ["leaves transforms and forward-mode derivatives to the formula"]
    return []


def only_by_name(problem: BiasActivationProblem) -> str | None:
    return None if problem.device.type == "cuda" else "our own kernels are faster here"


def forward(operands: Operands, options: Options) -> Tensor:
    """y; autograd differentiates torch's functions to any order."""
    x, bias, _ = operands
    h = x if bias is None else x + bias
    if not options.gated:
        return activate(h, options.activation).contiguous()
    gate, up = h.chunk(2, dim=-1)
    return (activate(gate, options.activation) * up).contiguous()
