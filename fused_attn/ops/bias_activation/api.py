"""The public function of bias + activation; the package hands it on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...runtime import hints
from ...runtime.activations import Activation
from . import call
from .call import Scalars
from .problem import Operands


def bias_activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation,
    gated: bool = False,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """What stands between the two linears of a feed-forward, in one pass over memory.

    In plain PyTorch, with arithmetic in float32 (float64 for float64) and rounded once::

        h = x + bias
        y = dropout(act(h), dropout_p)                   # act: F.relu, F.gelu, F.silu
        gate, up = h.chunk(2, dim=-1)                    # gated: SwiGLU, GEGLU, ReGLU
        y = dropout(act(gate) * up, dropout_p)           # (Shazeer 2020, equation 5)

    The backward keeps x and bias alone and computes the rest again.

    Args:
        x: (*, W), or (*, 2 W) if gated: gates first; float32, float16, bfloat16 or float64; any
            strides.
        bias: (x.shape[-1],); where its dtype differs, y has the promoted one, as x + bias has.
        activation: "relu", "gelu" (exact, with erf), "gelu_tanh" or "silu".
        dropout_p: probability in [0, 1] of dropping an element of y; the kept ones are divided by
            1 - dropout_p. Applied whenever it is not 0.
        dropout_rng: (2,) int64, seed and offset of the dropout. One pair gives the same mask on
            every backend. Drawn from torch's generator if None.
        out: write y here instead of into a new tensor, x itself allowed (its first half if gated);
            no gradient may be wanted.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        y (*, W), new and contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    if unknown:
        hints.refuse_unknown("bias_activation", unknown, bias_activation.__annotations__)
    operands = Operands(x, bias, dropout_rng if dropout_p else None)
    return call.run(operands, Scalars(activation, gated, dropout_p, backend), out)
