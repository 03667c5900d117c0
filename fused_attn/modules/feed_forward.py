"""linear2(dropout(activation(linear1(x)))), with activation and dropout as one operation.

The gated forms multiply activation(gate) by the other half of linear1's features. One operation is
where linear1 and the dropout are plain (`residual`), the activation is one that
`fused_attn.bias_activation` knows, and a kernel can run it. Everything else is called as given.

linear1's bias is part of the operation in float32 and float64. In 16 bits it is part of the
product, whose sum is rounded once: a product that is rounded before its bias is added puts units
near 0 on the wrong side of ReLU's kink, and their whole gradient with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dispatch
from ..ops.bias_activation import call
from ..ops.bias_activation.api import bias_activation
from ..ops.linear import measured
from ..ops.linear.api import linear
from ..runtime import autocast, checks, higher_order, hints
from ..runtime.activations import Activation
from . import token_wise
from .linear import call_linear, is_plain, project
from .residual import has_hooks, is_plain_tensor
from .scripting import NotScriptable

_FUNCTIONS: tuple[tuple[Callable[..., Tensor], Activation], ...] = (
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
)
_GELUS: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}

# Activations of FusedFeedForward; those of _GATED multiply the other half of the features.
_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "swiglu": nn.SiLU,
    "geglu": nn.GELU,
    "reglu": nn.ReLU,
}
_GATED = ("swiglu", "geglu", "reglu")

# Modules of others that compute one of ours, whatever their settings; by name, so that nothing need
# be imported.
FOREIGN_ACTIVATIONS: dict[str, Activation] = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}

_has_kernel = functools.cache(call.has_kernel)


def feed_forward(
    x: Tensor,
    linear1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Module,
    linear2: nn.Module,
    gated: bool = False,
) -> Tensor:
    """The position-wise network of a Transformer layer (Vaswani et al. 2017, section 3.3)."""
    name = name_of(activation)
    if name is None or not is_plain(linear1) or not runs_fused(x, linear1, name):
        _note_modules(name, linear1)
        h = call_linear(linear1, x)
        if gated:
            gate, up = h.chunk(2, dim=-1)
            return call_linear(linear2, dropout(activation(gate) * up))
        return call_linear(linear2, dropout(activation(h)))
    dropout_p = 0.0
    rest: nn.Module | None = dropout
    if type(dropout) is nn.Dropout and not has_hooks(dropout):
        dropout_p, rest = dropout.p if dropout.training else 0.0, None
    how: _How = {"activation": name, "gated": gated, "dropout_p": dropout_p}
    if _in_one_pass(x, linear1):
        y = linear(x, linear1.weight, linear1.bias, **how)
    else:
        y = _activated(x, linear1, how)
    return call_linear(linear2, y if rest is None else rest(y))


class _How(TypedDict):
    """What comes after the first product."""

    activation: Activation
    gated: bool
    dropout_p: float


def _activated(x: Tensor, linear1: nn.Linear, how: _How) -> Tensor:
    """The product, and then what comes after it."""
    bias: Tensor | None = linear1.bias
    if bias is not None and product_dtype(x).itemsize < 4:
        h, bias = project(x, linear1.weight, bias), None
    else:
        # Without its bias: torch would write the bias to memory first and add to it.
        h = project(x, linear1.weight)
        if bias is not None and bias.dtype != h.dtype:  # float64 under autocast
            bias = bias.to(h.dtype)
    _note_fused(how["activation"], bias)
    # Half of a row of gates and products would be a strided operand of linear2.
    out = h if not how["gated"] and may_be_overwritten(h, bias) else None
    return bias_activation(h, bias, **how, out=out)


def _in_one_pass(x: Tensor, linear1: nn.Linear) -> bool:
    """True where our product may be the faster one, and no backward wants it.

    A backward would compute the product again; torch's product in float32 and one pass of ours
    after it take 0.9 of the time of ours with all in it.
    """
    operands = (x, linear1.weight, linear1.bias)
    return (
        product_dtype(x).itemsize < 4
        and not measured.is_never_ours(x)
        and dispatch.is_plain(operands)
        and not x.is_nested
        and not higher_order.derivative_wanted(operands)
    )


class FusedFeedForward(NotScriptable, nn.Module):
    """linear2(dropout(activation(linear1(x)))): bias, activation and dropout in one pass.

    "swiglu", "geglu" and "reglu" are the gated forms of Shazeer 2020 (https://arxiv.org/abs/
    2002.05202, equation 5): linear1 has 2 * dim_feedforward outputs, gates first. Children are
    called as modules where they have hooks or were replaced, as in `FusedTransformerEncoderLayer`.

    Args:
        d_model: features of input and output.
        dim_feedforward: features between the two linears.
        dropout: probability of dropping one of these in training.
        activation: "relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu" or "reglu".
        bias: both linears have one.

    Raises:
        ValueError: `activation` is none of these, or `dropout` no probability.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(activation, str) or activation not in _LAYERS:
            known = ", ".join(map(repr, _LAYERS))
            message = f"`activation` must be one of {known}, got {activation!r}"
            raise ValueError(hints.with_hint(message, hints.for_activation(activation)))
        self.gated = activation in _GATED
        width = 2 * dim_feedforward if self.gated else dim_feedforward
        self.linear1 = nn.Linear(d_model, width, bias, device, dtype)
        self.activation = _LAYERS[activation]()
        self.dropout = nn.Dropout(checks.expect_probability("dropout", dropout))
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(*, d_model) -> (*, d_model), new.

        Raises:
            TypeError: x is no tensor.
            RuntimeError: x is of another width or dtype, as torch.nn.Linear says.
        """
        checks.expect_any_tensor("x", x)
        return feed_forward(
            x, self.linear1, self.activation, self.dropout, self.linear2, self.gated
        )

    def extra_repr(self) -> str:
        return "gated=True" if self.gated else ""


def runs_fused(x: Tensor, first: nn.Linear, name: Activation) -> bool:
    ask = call.has_kernel if torch.compiler.is_compiling() else _has_kernel
    return ask(x.device, product_dtype(x), first.out_features, name)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of what a linear makes of x."""
    return autocast.dtype_for(x) or x.dtype


def _note_modules(name: Activation | None, first: nn.Module) -> None:
    """Tell whoever watches why the sub-modules are called one by one."""
    if not dispatch.is_watched():
        return
    if name is None:
        why = "the activation has hooks, or is none that bias_activation knows"
    elif not is_plain(first):
        why = token_wise.why_not("linear1", first)
    else:
        why = "no kernel can run bias_activation here"
    dispatch.note(f"feed-forward: one sub-module after the other, since {why}")


def _note_fused(name: Activation, bias: Tensor | None) -> None:
    """Tell whoever watches where the bias is added."""
    if dispatch.is_watched():
        where = "the product has the bias, if any" if bias is None else "bias after the product"
        dispatch.note(f"feed-forward: {where}; {name} and dropout in one pass")


def may_be_overwritten(h: Tensor, bias: Tensor | None) -> bool:
    """True if nobody but the activation will look at `h`."""
    return (
        not higher_order.derivative_wanted((h, bias))
        and not higher_order.needs_formula()
        and not dispatch.is_traced()
        and is_plain_tensor(h)
    )


def name_of(activation: Callable[[Tensor], Tensor]) -> Activation | None:
    """What `bias_activation` calls `activation`; None if it does not know it."""
    if not isinstance(activation, nn.Module):
        return next((name for function, name in _FUNCTIONS if activation is function), None)
    if has_hooks(activation):
        return None
    if type(activation) is nn.ReLU:
        return "relu"
    if type(activation) is nn.SiLU:
        return "silu"
    if type(activation) is nn.GELU:
        return _GELUS.get(activation.approximate)
    cls = type(activation)
    return FOREIGN_ACTIVATIONS.get(f"{cls.__module__}.{cls.__name__}")
