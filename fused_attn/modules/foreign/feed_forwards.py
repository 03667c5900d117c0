"""Feed-forwards of others, by the formula of their `forward`: bias and activation in one pass.

The linears stay what they are; where one has hooks, was wrapped or quantized, all sub-modules are
called one after the other, as theirs do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.bias_activation.api import bias_activation
from ...runtime import higher_order
from .. import feed_forward as ours
from ..linear import call_linear, is_plain, project
from ..residual import has_hooks, is_plain_tensor
from .formula import Form, Formula, Fused

Attributes = tuple[str, ...]

_NO_DROPOUT = nn.Dropout(0.0).eval()
_NOTHING = nn.Identity()
_DROPOUTS = (nn.Dropout, nn.Identity)


def _chain(second: int | None, activation: int, first: int, *, dropout: int | None = None) -> Form:
    """second(dropout(activation(first(x)))); without `second`, the activation's result."""

    def make(names: Attributes) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            one, act = getattr(module, names[first]), getattr(module, names[activation])
            two = _NOTHING if second is None else getattr(module, names[second])
            drop = _NO_DROPOUT if dropout is None else getattr(module, names[dropout])
            if _is_conv1d(one):
                return _of_conv1d(x, one, act, drop, two)
            return ours.feed_forward(x, one, act, drop, two)

        return run

    return Form(make, _asking(activation, first, dropout))


def _gated(second: int, activation: int, gate: int, up: int, *, dropout: int | None = None) -> Form:
    """second(dropout(activation(gate(x)) * up(x)))."""

    def make(names: Attributes) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            act = getattr(module, names[activation])
            drop = _NO_DROPOUT if dropout is None else getattr(module, names[dropout])
            name = ours.name_of(act)
            pair = getattr(module, names[gate]), getattr(module, names[up])
            h = None if name is None else _gates_and_products(x, name, *pair)
            if h is None or name is None:
                return None
            y = bias_activation(h, activation=name, gated=True)
            return call_linear(getattr(module, names[second]), drop(y))

        return run

    return Form(make, _asking(activation, gate, dropout))


def _packed(second: int, both: int, activation: int, *, dropout: int | None = None) -> Form:
    """One linear makes gates and products, gates first."""

    def make(names: Attributes) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            drop = _NO_DROPOUT if dropout is None else getattr(module, names[dropout])
            one, act, two = (getattr(module, names[i]) for i in (both, activation, second))
            return ours.feed_forward(x, one, act, drop, two, gated=True)

        return run

    return Form(make, _asking(activation, both, dropout))


def _then(inner: Form, outer: int) -> Form:
    """`outer`, a dropout, after another form."""

    def make(names: Attributes) -> Fused:
        before = inner.make(names)

        def run(module: Any, x: Tensor) -> Tensor | None:
            y = before(module, x)
            result: Tensor | None = None if y is None else getattr(module, names[outer])(y)
            return result

        return run

    def why_not(module: Any, formula: Formula) -> str | None:
        last = getattr(module, formula.attributes[outer])
        return inner.why_not(module, formula) if isinstance(last, _DROPOUTS) else ""

    return Form(make, why_not)


def _without(inner: Form, identity: int) -> Form:
    """A form whose attribute `identity` does nothing, and is left out."""

    def make(names: Attributes) -> Fused:
        rest = inner.make(names)

        def run(module: Any, x: Tensor) -> Tensor | None:
            nothing = getattr(module, names[identity])
            return (
                rest(module, x) if type(nothing) is nn.Identity and not has_hooks(nothing) else None
            )

        return run

    def why_not(module: Any, formula: Formula) -> str | None:
        nothing = getattr(module, formula.attributes[identity], None)
        return inner.why_not(module, formula) if type(nothing) is nn.Identity else ""

    return Form(make, why_not)


def _of_t5(inner: Form) -> Form:
    """T5 casts to the dtype of `wo`, which may be kept wider: then theirs runs."""

    def make(names: Attributes) -> Fused:
        casting = inner.make(names)

        def run(module: Any, x: Tensor) -> Tensor | None:
            same = getattr(getattr(module, names[0]).weight, "dtype", None) == x.dtype
            return casting(module, x) if same else None

        return run

    return Form(make, inner.why_not)


def _asking(activation: int, first: int, dropout: int | None) -> Any:
    """Why activation(first(x)) is none of ours."""

    def why_not(module: Any, formula: Formula) -> str | None:
        parts: Any = [getattr(module, formula.attributes[i], None) for i in (activation, first)]
        if dropout is not None:
            between = getattr(module, formula.attributes[dropout], None)
            if not isinstance(between, _DROPOUTS):
                return ""
        if not isinstance(parts[1], nn.Linear) and not _is_conv1d(parts[1]):
            return ""
        if ours.name_of(parts[0]) is None:
            return f"its activation {type(parts[0]).__name__} is none of `bias_activation`"
        return None

    return why_not


_HALF = "a1(x0).chunk(2, dim=-1)"
_WO = (
    "a0({0}.to(a0.weight.dtype) if isinstance(a0.weight, torch.Tensor) and {0}.dtype != "
    "a0.weight.dtype and (a0.weight.dtype != torch.int8) else {0})"
)

# By formula. Where several have one, by what the attributes are: the first that fits.
FEED_FORWARDS: dict[str, tuple[Form, ...]] = {
    "a0(a1(x0))": (_chain(None, 0, 1),),  # BertIntermediate
    "a0(a1(a2(x0)))": (_chain(0, 1, 2),),  # fc1, activation, fc2
    "a0(a1(a2(a3(x0))))": (  # GPT-2: dropout last; else dropout between
        _then(_chain(1, 2, 3), 0),
        _chain(0, 2, 3, dropout=1),
        _chain(0, 1, 3),
    ),
    "a0(a1(a2(a3(a4(x0)))))": (_then(_chain(1, 3, 4, dropout=2), 0),),  # Wav2Vec2
    "a0(a1(a0(a2(a3(x0)))))": (_then(_chain(1, 2, 3, dropout=0), 0),),  # timm's and others
    "a0(a1(a2(a3(a4(a5(x0))))))": (_without(_then(_chain(1, 4, 5, dropout=3), 0), 2),),  # timm
    "a0(a1(a2(x0)) * a3(x0))": (_gated(0, 1, 2, 3),),  # Llama and 140 others
    "a0(a1(a2(a3(x0)) * a4(x0)))": (_gated(0, 2, 3, 4, dropout=1),),
    f"a0({_HALF}[1] * a2({_HALF}[0]))": (_packed(0, 1, 2),),  # Phi-3
    "a0(a1(a2(x0).chunk(2, dim=-1)[0]) * a2(x0).chunk(2, dim=-1)[1])": (_packed(0, 2, 1),),
    "a0(a1(a2(a3(x0).chunk(2, dim=-1)[0]) * a3(x0).chunk(2, dim=-1)[1]))": (
        _packed(0, 3, 2, dropout=1),  # ModernBERT
    ),
    _WO.format("a1(a2(a3(x0)))"): (_of_t5(_chain(0, 2, 3, dropout=1)),),
    _WO.format("a1(a2(a3(x0)) * a4(x0))"): (_of_t5(_gated(0, 2, 3, 4, dropout=1)),),
}


_CONV1D = ("Conv1D", "FusedConv1D")  # as it is, and after `fuse(model, linears=True)`


def _is_conv1d(module: Any) -> bool:
    """GPT-2's linear, whose weight is (in, out)."""
    cls = type(module)
    return cls.__module__ == "transformers.pytorch_utils" and cls.__name__ in _CONV1D


def _of_conv1d(x: Tensor, one: Any, act: Any, drop: nn.Module, two: nn.Module) -> Tensor | None:
    name = ours.name_of(act)
    plain = is_plain_tensor(one.weight) and is_plain_tensor(one.bias) and not has_hooks(one)
    if name is None or not plain:
        return None
    dtype = ours.product_dtype(x)
    if dtype.itemsize < 4:  # the bias inside the product: its sum is rounded once
        y = bias_activation(project(x, one.weight.t(), one.bias), activation=name)
    else:
        y = bias_activation(project(x, one.weight.t()), one.bias, activation=name)
    return call_linear(two, drop(y))


def _gates_and_products(x: Tensor, name: Any, gate: Any, up: Any) -> Tensor | None:
    """(*, 2 W): gate(x) and up(x) side by side; None where theirs should run."""
    if not is_plain(gate) or not is_plain(up):
        return None
    if gate.weight.shape != up.weight.shape or not ours.runs_fused(x, gate, name):
        return None
    wanted = (x, gate.weight, gate.bias, up.weight, up.bias)
    plain = ours.product_dtype(x) == torch.float32 and all(
        p is None or p.dtype == torch.float32 for p in wanted
    )
    alone: bool = ours.may_be_overwritten(x, None) and not higher_order.derivative_wanted(wanted)
    if not plain or not alone or x.shape[-1] != gate.in_features:
        return torch.cat([call_linear(gate, x), call_linear(up, x)], dim=-1)
    # Nobody differentiates: each product is written to its half, and nothing is copied.
    rows = x.reshape(-1, gate.in_features)
    h = x.new_empty(*x.shape[:-1], 2 * gate.out_features)
    halves = h.view(-1, 2 * gate.out_features).chunk(2, dim=-1)
    for linear, half in zip((gate, up), halves, strict=True):
        bias: Tensor | None = linear.bias
        if bias is None:
            torch.mm(rows, linear.weight.t(), out=half)
        else:
            torch.addmm(bias, rows, linear.weight.t(), out=half)
    return h
