"""The public function of the linear; the package hands it on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...runtime import hints
from ...runtime.activations import Activation
from . import call
from .call import Scalars
from .problem import Operands


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """x weightᵀ + bias, as `torch.nn.functional.linear`, and what comes after it, in one pass.

    In plain PyTorch, with sums in float32 (float64 for float64) and rounded once::

        h = x @ weight.t() + bias
        y = dropout(act(h), dropout_p) + residual         # act: F.relu, F.gelu, F.silu or none
        gate, up = h.chunk(2, dim=-1)                     # gated: SwiGLU, GEGLU, ReGLU
        y = dropout(act(gate) * up, dropout_p) + residual

    Our product runs where it was measured to be faster: in bfloat16 and float16 on processors that
    have no instructions for their products; there the rest is done while the product is in the
    first cache. It also runs where there is dropout. Everywhere else torch's functions run, one
    after the other; `explain(fused_attn.linear, ...)` says which and why. Of our calls, the
    backward keeps the operands alone: with an activation it computes the product again.

    Args:
        x: (*, in) float32, bfloat16, float16 or float64; any strides. Under autocast all operands
            are converted first.
        weight: (out, in) in the same dtype, or (in,) for an output without that dimension; if gated
            (2 out, in), the rows of the gates first.
        bias: (weight.shape[0],), or () with a weight of one dimension; in the same dtype.
        activation: "relu", "gelu" (exact, with erf), "gelu_tanh", "silu" or None.
        gated: multiply the activation of the first half of h by the other half.
        residual: (*, out) in x's dtype, added last.
        dropout_p: probability in [0, 1] of dropping an element; the kept ones are divided by
            1 - dropout_p. Applied whenever it is not 0.
        dropout_rng: (2,) int64, seed and offset of the dropout: the mask is that of
            `bias_activation` for the same pair, on every backend. Drawn from torch's generator if
            None.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        y (*, out), new.

    Raises:
        TypeError: an operand is no tensor, or of a dtype that is not listed.
        ValueError: `activation`, `gated` or the dropout is wrong; the message names it.
        RuntimeError: shapes, dtypes or devices do not fit, as torch's linear says it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    if unknown:
        hints.refuse_unknown("linear", unknown, linear.__annotations__)
    scalars = Scalars(backend, activation, gated, dropout_p)
    rng = dropout_rng if dropout_p else None
    if isinstance(weight, Tensor) and weight.dim() == 1:  # one output, without a dimension
        bias = bias[None] if isinstance(bias, Tensor) else bias
        residual = residual[..., None] if isinstance(residual, Tensor) else residual
        return call.run(Operands(x, weight[None], bias, residual, rng), scalars)[..., 0]
    return call.run(Operands(x, weight, bias, residual, rng), scalars)
