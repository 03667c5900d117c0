"""Norms of others, by the formula of their `forward`.

All have one argument. A fused norm computes in float32 and rounds once, where theirs may round
before the weight is applied; where the dtype of the result would differ, theirs runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...ops.layer_norm import api as norms
from ..layer_norm import _wants_torch as wants_theirs
from .formula import Form, Formula, Fused

Attributes = tuple[str, ...]

_MEAN = "torch.rsqrt(x0.to(torch.float32).pow(2).mean(-1, keepdim=True) + a1)"
_LLAMA = f"(x0.to(torch.float32) * {_MEAN})"
_GEMMA = "x0.float() * torch.rsqrt(x0.float().pow(2).mean(-1, keepdim=True) + a0)"
_GEMMA_4 = "x0.float() * torch.pow(x0.float().pow(2).mean(-1, keepdim=True) + a1, -0.5)"
_T5 = f"x0 * {_MEAN}"
_CENTRED = "(x0.to(torch.float32) - x0.to(torch.float32).mean(-1, keepdim=True))"
_COHERE = f"{_CENTRED} * torch.rsqrt({_CENTRED}.pow(2).mean(-1, keepdim=True) + a1)"


def _rms(weight: int | None, eps: int, *, offset: float = 0.0, flag: int | None = None) -> Any:
    """RMSNorm whose result has x's dtype, whatever that of its weight."""

    def make(names: Attributes) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            scale = None if weight is None else getattr(module, names[weight], None)
            if flag is not None and not getattr(module, names[flag]):
                scale = None
            if wants_theirs(x, scale):
                return None
            return norms.rms_norm(
                x, x.shape[-1], scale, getattr(module, names[eps]), weight_offset=offset
            )

        return run

    return make


def _rms_of_one_dtype(weight: int, eps: int) -> Any:
    """RMSNorm whose result has the dtype of weight * x: fused where the two are one."""

    def make(names: Attributes) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            scale = getattr(module, names[weight])
            if wants_theirs(x, scale) or (scale is not None and scale.dtype != x.dtype):
                return None
            return norms.rms_norm(x, x.shape[-1], scale, getattr(module, names[eps]))

        return run

    return make


def _layer(*, channels_first: bool = False, widens: bool = False) -> Any:
    """A subclass of nn.LayerNorm, of the last dimension or of that of channels (N, C, H, W)."""

    def make(names: Attributes) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            if wants_theirs(x, module.weight, module.bias) or not x.is_floating_point():
                return None
            if (
                channels_first
                and getattr(module, "data_format", "channels_first") != "channels_last"
            ):
                y = _layer_norm(module, x.permute(0, 2, 3, 1), widens)
                return None if y is None else y.permute(0, 3, 1, 2)
            return _layer_norm(module, x, widens)

        return run

    return make


def _layer_norm(module: Any, x: Tensor, widens: bool) -> Tensor | None:
    weight, bias = module.weight, module.bias
    if widens:
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    if any(p is not None and p.dtype != x.dtype and x.dtype.itemsize > 2 for p in (weight, bias)):
        return None
    return norms.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _centred(names: Attributes) -> Fused:
    def run(module: Any, x: Tensor) -> Tensor | None:
        weight = getattr(module, names[0])
        if wants_theirs(x, weight) or weight.dim() != 1:
            return None
        return norms.layer_norm(x, x.shape[-1], weight.to(x.dtype), None, getattr(module, names[1]))

    return run


_TO_LAST = "x0.permute(0, 2, 3, 1)"
_FUNCTIONAL = "F.layer_norm({0}, a1, a2, a3, a4)"

# By formula: (names of the attributes) -> the fused norm.
_NORMS: dict[str, Callable[[Attributes], Fused]] = {
    f"a0 * {_LLAMA}.to(x0.dtype)": _rms_of_one_dtype(0, 1),  # Llama and 140 others
    f"(a0 * {_LLAMA}).to(x0.dtype)": _rms(0, 1),  # OLMo
    f"(a0.to(torch.float32) * {_LLAMA}).to(x0.dtype)": _rms(0, 1),  # Helium
    f"({_GEMMA} * (1.0 + a1.float())).type_as(x0)": _rms(1, 0, offset=1.0),  # Gemma
    f"({_GEMMA} * a1.float()).type_as(x0)": _rms(1, 0),  # Moshi
    f"({_GEMMA}).type_as(x0) * a1": _rms_of_one_dtype(1, 0),  # Llama 4
    f"({_GEMMA}).type_as(x0)": _rms(None, 0),  # NanoChat
    f"({_GEMMA_4} * a2.float() if a0 else {_GEMMA_4}).type_as(x0)": _rms(2, 1, flag=0),  # Gemma 3n
    f"a0 * (({_T5}).to(a0.dtype) if a0.dtype in [torch.float16, torch.bfloat16] else {_T5})":
        _rms_of_one_dtype(0, 1),
    f"(a0.to(torch.float32) * ({_COHERE})).to(x0.dtype)": _centred,
    # Subclasses of nn.LayerNorm: timm's, ConvNeXt's, and others for channels.
    f"fast_layer_norm(x0, a1, a2, a3, a4) if a0 else {_FUNCTIONAL.format('x0')}": _layer(),
    f"(fast_layer_norm({_TO_LAST}, a1, a2, a3, a4) if a0 else {_FUNCTIONAL.format(_TO_LAST)})"
    ".permute(0, 3, 1, 2)": _layer(channels_first=True),
    f"F.layer_norm({_TO_LAST}, a0, a1, a2, a3).permute(0, 3, 1, 2)": _layer(channels_first=True),
    f"super().forward({_TO_LAST}).permute(0, 3, 1, 2) if a0 == 'channels_first' else "
    "super().forward(x0)": _layer(channels_first=True),
    "F.layer_norm(x0, a0, a1, a2, a3)": _layer(),
    "F.layer_norm(x0.float(), a0, a1.float() if a1 is not None else None, "
    "a2.float() if a2 is not None else None, a3).to(x0.dtype)": _layer(widens=True),
    "fast_rms_norm(x0, a1, a2, a3) if a0 else rms_norm(x0, a1, a2, a3)": _rms_of_one_dtype(2, 3),
}  # fmt: skip
_IN_ORDER = ("normalized_shape", "weight", "bias", "eps")
_BESIDE = ("_fast_norm", "data_format")
_TIMM = ("fast_layer_norm", "fast_rms_norm", "rms_norm")  # functions that timm's norms call


def _why_not(module: Any, formula: Formula) -> str | None:
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    meant = vars(owner)["forward"].__globals__
    called = [name for name in _TIMM if re.search(rf"(?<![.\w]){name}\(", formula.text)]
    if not all(_is_timm(meant.get(name)) for name in called):
        return "it calls a function of its own"
    if getattr(module, "_fast_norm", False):
        return "its `_fast_norm` is on, which asks for a norm of its own"
    if "layer_norm(" in formula.text or "super()" in formula.text:
        if not isinstance(module, nn.LayerNorm):
            return "it is no subclass of torch.nn.LayerNorm"
        if "super()" in formula.text and owner.__bases__ != (nn.LayerNorm,):
            return f"{owner.__name__} is no direct subclass of torch.nn.LayerNorm"
        used = tuple(name for name in formula.attributes if name not in _BESIDE)
        if used not in ((), _IN_ORDER):
            return "its attributes are not those of torch.nn.LayerNorm"
    elif len(getattr(module, "normalized_shape", (1,))) != 1:
        return "it norms more than one dimension"
    return None


def _is_timm(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith("timm.")


NORMS = {text: (Form(make, _why_not),) for text, make in _NORMS.items()}
