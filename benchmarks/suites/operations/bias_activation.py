"""Bias + activation of a feed-forward as a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops.bias_activation import BACKENDS, call
from fused_attn.ops.bias_activation.api import Activation, bias_activation
from fused_attn.ops.bias_activation.call import Scalars
from fused_attn.ops.bias_activation.problem import Operands

from ..problem import Prepared, Problem, Side, leaves, with_flags
from .sides import our_sides


@dataclass(frozen=True, kw_only=True)
class BiasActivation(Problem):
    """gelu(x + bias), or silu(gate) * up of both halves of x + bias.

    Attributes:
        width: features of x.
        variant: "gelu" or "swiglu".
        dropout: behind it; results are compared without.
    """

    operation: ClassVar[str] = "bias_activation"
    bound: ClassVar[str] = "memory"
    differentiable: ClassVar[tuple[str, ...]] = ("x", "bias")

    rows: int
    width: int
    variant: str = "gelu"
    dropout: float = 0.0

    @property
    def gated(self) -> bool:
        return self.variant == "swiglu"

    @property
    def size(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"bias+{self.variant} {self.rows}x{self.width}{dropout}"

    def columns(self) -> dict[str, object]:
        return {"rows": self.rows, "width": self.width, "variant": self.variant}

    @property
    def bytes(self) -> float:
        """Forward: x in, y out; backward: dy and x in, dx out. A gated y is half of x."""
        out = 0.5 if self.gated else 1.0
        tensors = {"forward": 1 + out, "backward": 2 + out, "training": 3 + 2 * out}
        return tensors[self.direction] * self.rows * self.width * self.dtype.itemsize

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.draw(self.rows, self.width), "bias": self.draw(self.width)}

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        h = tensors["x"] + tensors["bias"]
        if not self.gated:
            return (F.dropout(F.gelu(h), self.dropout),)
        gate, up = h.chunk(2, dim=-1)
        return (F.dropout(F.silu(gate) * up, self.dropout),)

    def checked(self) -> Problem:
        return self.replace(dropout=0.0)

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        operands = Operands(**with_flags(self, tensors))
        description = call.problem_of(operands, Scalars(self.activation, self.gated))
        return our_sides(BACKENDS, description, self._prepare)

    @property
    def activation(self) -> Activation:
        return "silu" if self.gated else "gelu"

    def empty_result(self) -> Tensor:
        width = self.width // 2 if self.gated else self.width
        return torch.empty(self.rows, width, dtype=self.dtype, device=self.device)

    def _prepare(self, backend: str, tensors: dict[str, Tensor]) -> Prepared:
        x, bias = tensors.values()
        out = None if self.wants_gradient else self.empty_result()
        return Prepared(
            lambda: bias_activation(
                x,
                bias,
                activation=self.activation,
                gated=self.gated,
                dropout_p=self.dropout,
                out=out,
                backend=backend,
            ),
            leaves(self, tensors),
        )
