"""linear2(dropout(activation(linear1(x)))), with bias, activation and dropout as one operation.

That is where linear1 and the dropout are plain (`residual`), the activation is one that
`fused_attn.bias_activation` knows, and a kernel can run it. Everything else is called as given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import autocast, dispatch, higher_order
from ..activations import Activation, bias_activation
from ..bias_activation import call
from .residual import has_hooks, is_plain_tensor

_FUNCTIONS: tuple[tuple[Callable[..., Tensor], Activation], ...] = (
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
)
_GELUS: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}

_has_kernel = functools.cache(call.has_kernel)


def feed_forward(
    x: Tensor,
    linear1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Module,
    linear2: nn.Module,
) -> Tensor:
    """The position-wise network of a Transformer layer (Vaswani et al. 2017, section 3.3)."""
    name = _name_of(activation)
    if name is None or not _is_plain_linear(linear1) or not _runs_fused(x, linear1, name):
        return linear2(dropout(activation(linear1(x))))
    # The product without its bias: torch would write the bias to memory first and add to it.
    h = F.linear(x, linear1.weight)
    bias: Tensor | None = linear1.bias
    if bias is not None and bias.dtype != h.dtype:  # under autocast
        bias = bias.to(h.dtype)
    dropout_p = 0.0
    rest: nn.Module | None = dropout
    if type(dropout) is nn.Dropout and not has_hooks(dropout):
        dropout_p, rest = dropout.p if dropout.training else 0.0, None
    out = h if _may_be_overwritten(h, bias) else None
    y = bias_activation(h, bias, activation=name, dropout_p=dropout_p, out=out)
    return linear2(y if rest is None else rest(y))


def _is_plain_linear(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """True if calling `linear` is `F.linear` with its parameters, and nothing else."""
    return (
        type(linear) is nn.Linear
        and not has_hooks(linear)
        and is_plain_tensor(linear.weight)
        and is_plain_tensor(linear.bias)
        and (linear.bias is None or linear.bias.dtype == linear.weight.dtype)
    )


def _runs_fused(x: Tensor, linear: nn.Linear, name: Activation) -> bool:
    dtype = x.dtype
    if autocast.enabled(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    ask = call.has_kernel if torch.compiler.is_compiling() else _has_kernel
    return ask(x.device, dtype, linear.out_features, name)


def _may_be_overwritten(h: Tensor, bias: Tensor | None) -> bool:
    """True if nobody but the activation will look at `h`."""
    return (
        not higher_order.derivative_wanted((h, bias))
        and not higher_order.needs_formula()
        and not dispatch.is_traced()
        and is_plain_tensor(h)
    )


def _name_of(activation: Callable[[Tensor], Tensor]) -> Activation | None:
    """What `bias_activation` calls `activation`; None if it does not know it."""
    if not isinstance(activation, nn.Module):
        return next((name for function, name in _FUNCTIONS if activation is function), None)
    if has_hooks(activation):
        return None
    if type(activation) is nn.ReLU:
        return "relu"
    if type(activation) is nn.SiLU:
        return "silu"
    return _GELUS.get(activation.approximate) if type(activation) is nn.GELU else None
