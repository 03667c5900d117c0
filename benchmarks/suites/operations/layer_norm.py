"""Residual + LayerNorm (or RMSNorm) as a problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops.layer_norm import BACKENDS, call
from fused_attn.ops.layer_norm.api import add_layer_norm, add_rms_norm
from fused_attn.ops.layer_norm.call import Scalars
from fused_attn.ops.layer_norm.problem import Operands

from ..problem import Prepared, Problem, Side, leaves, with_flags
from .sides import our_sides

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class AddNorm(Problem):
    """y = norm(x + residual), and the sum; the gradient is y's.

    Attributes:
        variant: "layer" or "rms".
    """

    operation: ClassVar[str] = "add_norm"
    bound: ClassVar[str] = "memory"
    differentiable: ClassVar[tuple[str, ...]] = ("x", "residual", "weight", "bias")

    rows: int
    width: int
    variant: str = "layer"

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("out",) if self.wants_gradient else ("out", "sum")

    @property
    def rms(self) -> bool:
        return self.variant == "rms"

    @property
    def size(self) -> str:
        return f"add+{self.variant}_norm {self.rows}x{self.width}"

    def columns(self) -> dict[str, object]:
        return {"rows": self.rows, "width": self.width, "variant": self.variant}

    @property
    def bytes(self) -> float:
        """Forward: x, residual in, y and the sum out; backward: dy, x, residual in, dx out."""
        tensors = {"forward": 4, "backward": 4, "training": 8}[self.direction]
        return float(tensors * self.rows * self.width * self.dtype.itemsize)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {
            "x": self.draw(self.rows, self.width),
            "residual": self.draw(self.rows, self.width),
            "weight": self.draw(self.width),
        }
        return tensors if self.rms else {**tensors, "bias": self.draw(self.width)}

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        h = tensors["x"] + tensors["residual"]
        if self.rms:
            return F.rms_norm(h, (self.width,), tensors["weight"], EPS), h
        return F.layer_norm(h, (self.width,), tensors["weight"], tensors["bias"], EPS), h

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        operands = Operands(**with_flags(self, tensors))
        scalars = Scalars((self.width,), EPS, self.rms, 0.0)
        return our_sides(BACKENDS, call.problem_of(operands, scalars), self._prepare)

    def _prepare(self, backend: str, tensors: dict[str, Tensor]) -> Prepared:
        add: Callable[..., Any] = add_rms_norm if self.rms else add_layer_norm
        x, residual, *parameters = tensors.values()
        if self.wants_gradient:
            return Prepared(
                lambda: add(x, residual, (self.width,), *parameters, EPS, backend=backend),
                leaves(self, tensors),
            )
        y, h = torch.empty_like(x), torch.empty_like(x)

        def forward() -> tuple[Tensor, Tensor]:
            add(x, residual, (self.width,), *parameters, EPS, out=y, sum_out=h, backend=backend)
            return y, h

        return Prepared(forward)
