"""norm(dropout(linear(x)) + residual), the end of a post-norm block of others (BertSelfOutput)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layer_norm import FusedLayerNorm
from ..linear import call_linear
from ..residual import add_norm
from .formula import Form, Formula, Fused


def _make(names: tuple[str, ...]) -> Fused:
    def run(module: Any, x: Tensor, residual: Tensor) -> Tensor | None:
        norm, dropout, linear = (getattr(module, name) for name in names)
        y = call_linear(linear, x)
        if y.shape != residual.shape or y.dtype != residual.dtype:
            return norm(dropout(y) + residual)
        return add_norm(y, residual, dropout, norm)

    return run


def _why_not(module: Any, formula: Formula) -> str | None:
    norm, dropout, linear = (getattr(module, name, None) for name in formula.attributes)
    fits = (
        type(norm) in (nn.LayerNorm, FusedLayerNorm)
        and type(dropout) is nn.Dropout
        and isinstance(linear, nn.Linear)
    )
    return None if fits else ""


RESIDUALS: dict[str, tuple[Form, ...]] = {"a0(a1(a2(x0)) + x1)": (Form(_make, _why_not),)}
