"""The public function of the linear; the package hands it on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...runtime import hints
from . import call
from .call import Scalars
from .problem import Operands


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """x weightᵀ + bias, as `torch.nn.functional.linear`: by ours where it is the faster product.

    In plain PyTorch, with sums in float32 (float64 for float64) and rounded once::

        y = x @ weight.t() + bias

    Ours runs where it was measured to be faster: in bfloat16 and float16 on processors that have no
    instructions for their products. Everywhere else torch's runs; `explain(fused_attn.linear, ...)`
    says which and why.

    Args:
        x: (*, in) float32, bfloat16, float16 or float64; any strides. Under autocast all operands
            are converted first.
        weight: (out, in) in the same dtype, or (in,) for an output without that dimension.
        bias: (out,), or () with such a weight; in the same dtype.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        y (*, out), new.

    Raises:
        TypeError: an operand is no tensor, or of a dtype that is not listed.
        RuntimeError: shapes, dtypes or devices do not fit, as torch's linear says it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    if unknown:
        hints.refuse_unknown("linear", unknown, linear.__annotations__)
    if isinstance(weight, Tensor) and weight.dim() == 1:  # one output, without a dimension
        bias = bias[None] if isinstance(bias, Tensor) else bias
        return call.run(Operands(x, weight[None], bias), Scalars(backend))[..., 0]
    return call.run(Operands(x, weight, bias), Scalars(backend))
