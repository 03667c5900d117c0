"""Linears of others, by the formula of their `forward`: for `fuse(model, linears=True)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..linear import project
from ..residual import is_plain_tensor
from .formula import Form, Formula, Fused


def _transposed(bias: int, weight: int) -> Form:
    """X weight + bias, whose weight is (in, out)."""

    def make(names: tuple[str, ...]) -> Fused:
        def run(module: Any, x: Tensor) -> Tensor | None:
            w, b = getattr(module, names[weight]), getattr(module, names[bias])
            return project(x, w.t(), b) if is_plain_tensor(w) and is_plain_tensor(b) else None

        return run

    def why_not(module: Any, formula: Formula) -> str | None:
        w = getattr(module, formula.attributes[weight], None)
        return None if isinstance(w, Tensor) and w.dim() == 2 else ""

    return Form(make, why_not)


LINEARS: dict[str, tuple[Form, ...]] = {
    # transformers' Conv1D, which GPT-2 is made of
    "torch.addmm(a0, x0.view(-1, x0.size(-1)), a1).view(x0.size()[:-1] + (a2,))": (
        _transposed(0, 1),
    ),
}
