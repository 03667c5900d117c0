"""torch's own product: it serves every device, and every CPU on which ours is not the faster."""

from __future__ import annotations

from torch import Tensor

# By this name: somebody may have put ours in the place of torch's.
from torch.nn.functional import linear as torch_linear

from .problem import LinearProblem, Operands, Options

NAME = "torch"
IS_FORMULA = IS_TORCH = True  # ordinary torch code: whoever traces sees torch's operator
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: LinearProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in x's dtype, as torch rounds it."""
    return torch_linear(*operands)
