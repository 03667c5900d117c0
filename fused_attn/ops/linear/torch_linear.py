"""torch's own product and what it has to come after it.

It serves every device, and every CPU on which ours is not the faster. In 16 bits torch rounds
between its functions.
"""

from __future__ import annotations

from torch import Tensor

# By this name: somebody may have put ours in the place of torch's.
from torch.nn.functional import linear as torch_linear

from . import reference
from .problem import LinearProblem, Operands, Options

NAME = "torch"
IS_FORMULA = IS_TORCH = True  # ordinary torch code: whoever traces sees torch's operator
OPERANDS = frozenset(("bias", "residual"))
GRADIENTS = frozenset(("x", "weight", "bias", "residual"))


def why_not(problem: LinearProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in x's dtype, as torch rounds it."""
    x, weight, bias, residual, _ = operands
    y = torch_linear(x, weight, bias)
    if options.activation:
        y = reference.after_product(y, operands, options)
    return y if residual is None else y + residual
