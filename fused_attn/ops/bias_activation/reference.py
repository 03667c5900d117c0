"""The operation in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order.
"""

from __future__ import annotations

from torch import Tensor

from ...runtime.activations import activate, dropout
from .problem import BiasActivationProblem, Operands, Options, compute_dtype, result_dtype

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: BiasActivationProblem) -> list[str]:
    return []


def forward(operands: Operands, options: Options) -> Tensor:
    """Y in `result_dtype(operands)`, rounded once.

    GELU: Hendrycks, Gimpel 2016, exact and with their tanh; SiLU: Elfwing, Uchibe, Doya 2017; the
    gated forms (GLU variants): Shazeer 2020, equation 5.
    """
    x, bias, rng = operands
    dtype = result_dtype(operands)
    h = x.to(compute_dtype(dtype))
    if bias is not None:
        h = h + bias.to(h.dtype)
    if options.gated:
        gate, up = h.chunk(2, dim=-1)
        y = activate(gate, options.activation) * up
    else:
        y = activate(h, options.activation)
    if rng is not None:
        y = dropout(y, rng, options.dropout_p)
    return y.to(dtype).contiguous()
