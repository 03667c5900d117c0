"""The first layer of a Transformer as a problem: token rows, scaled, plus positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops.embedding import BACKENDS, call
from fused_attn.ops.embedding.api import embedding
from fused_attn.ops.embedding.call import Scalars
from fused_attn.ops.embedding.problem import Operands

from ..problem import Prepared, Problem, Side, leaves, with_flags
from .sides import our_sides


@dataclass(frozen=True, kw_only=True)
class Embedding(Problem):
    """weight[tokens] * sqrt(width) + table, tokens drawn evenly."""

    operation: ClassVar[str] = "embedding"
    bound: ClassVar[str] = "memory"
    differentiable: ClassVar[tuple[str, ...]] = ("weight",)

    batch: int
    seqlen: int
    vocabulary: int
    width: int

    @property
    def size(self) -> str:
        return f"embedding {self.batch}x{self.seqlen} of {self.vocabulary}x{self.width}"

    def columns(self) -> dict[str, object]:
        return {
            "batch": self.batch, "seqlen_q": self.seqlen, "rows": self.vocabulary,
            "width": self.width,
        }  # fmt: skip

    @property
    def bytes(self) -> float:
        """Forward: a row in and one out a token; backward: dy in, the weight's gradient out."""
        tokens, weight = self.batch * self.seqlen, self.vocabulary
        rows = {"forward": 2 * tokens, "backward": tokens + weight, "training": 3 * tokens + weight}
        return float(rows[self.direction] * self.width * self.dtype.itemsize)

    @property
    def scale(self) -> float:
        return self.width**0.5

    def tensors(self) -> dict[str, Tensor]:
        return {
            "tokens": torch.randint(self.vocabulary, (self.batch, self.seqlen)).to(self.device),
            "weight": self.draw(self.vocabulary, self.width),
            "table": self.draw(self.seqlen, self.width),
        }

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        y = F.embedding(tensors["tokens"], tensors["weight"]) * self.scale
        return (y + tensors["table"],)

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        operands = Operands(**with_flags(self, tensors))
        description = call.problem_of(operands, Scalars(self.scale))
        return our_sides(BACKENDS, description, self._prepare)

    def _prepare(self, backend: str, tensors: dict[str, Tensor]) -> Prepared:
        tokens, weight, table = tensors.values()
        return Prepared(
            lambda: embedding(tokens, weight, table, scale=self.scale, backend=backend),
            leaves(self, tensors),
        )
