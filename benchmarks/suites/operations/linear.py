"""The linear as a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops.linear import BACKENDS, call
from fused_attn.ops.linear.api import linear
from fused_attn.ops.linear.call import Scalars
from fused_attn.ops.linear.problem import Operands

from ..problem import Prepared, Problem, Side, leaves, with_flags
from .sides import our_sides


@dataclass(frozen=True, kw_only=True)
class Linear(Problem):
    """x weightᵀ + bias."""

    operation: ClassVar[str] = "linear"
    bound: ClassVar[str] = "compute"
    differentiable: ClassVar[tuple[str, ...]] = ("x", "weight", "bias")

    rows: int
    width: int
    width_out: int

    @property
    def size(self) -> str:
        return f"linear {self.rows}x{self.width}x{self.width_out}"

    def columns(self) -> dict[str, object]:
        return {"rows": self.rows, "width": self.width, "variant": f"to {self.width_out}"}

    @property
    def flops(self) -> float:
        """One product forward, two backward."""
        products = {"forward": 1.0, "backward": 2.0, "training": 3.0}[self.direction]
        return products * 2.0 * self.rows * self.width * self.width_out

    def tensors(self) -> dict[str, Tensor]:
        weight = self.draw(self.width_out, self.width) / self.width**0.5
        return {
            "x": self.draw(self.rows, self.width),
            "weight": weight,
            "bias": self.draw(self.width_out),
        }

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        return (F.linear(tensors["x"], tensors["weight"], tensors["bias"]),)

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        description = call.problem_of(Operands(**with_flags(self, tensors)), Scalars())
        return our_sides(BACKENDS, description, self._prepare)

    def _prepare(self, backend: str, tensors: dict[str, Tensor]) -> Prepared:
        x, weight, bias = tensors.values()
        return Prepared(lambda: linear(x, weight, bias, backend=backend), leaves(self, tensors))
