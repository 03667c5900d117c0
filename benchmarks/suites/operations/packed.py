"""Packed batches as a problem: sequences of unequal length, without padding between them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.ops.attention import BACKENDS, call
from fused_attn.ops.attention.api import attention_varlen
from fused_attn.ops.attention.call import Scalars
from fused_attn.ops.attention.problem import Causal, Operands

from ..problem import Prepared, Problem, Side, leaves, with_flags
from .attention import MEAN_LENGTH, Attention, of_length, padded_lengths
from .sides import our_sides


@dataclass(frozen=True, kw_only=True)
class Packed(Problem):
    """Self-attention of `batch` sequences, `mean_length` of `seqlen` on average, end to end."""

    operation: ClassVar[str] = "packed"
    bound: ClassVar[str] = "compute"
    differentiable: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    batch: int
    heads: int
    heads_kv: int
    seqlen: int
    head_dim: int
    variant: str = "full"  # or "causal"
    mean_length: float = MEAN_LENGTH

    @property
    def size(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        variant = "" if self.variant == "full" else f" {self.variant}"
        size = f"{self.batch}x{heads}x{self.seqlen}x{self.head_dim}"
        return f"packed {size}{variant}{of_length(self.mean_length)}"

    def columns(self) -> dict[str, object]:
        names = ("batch", "heads", "heads_kv", "head_dim", "variant")
        lengths = {"seqlen_q": self.seqlen, "seqlen_k": self.seqlen}
        return {name: getattr(self, name) for name in names} | lengths

    @property
    def lengths(self) -> list[int]:
        return padded_lengths(self.batch, self.seqlen, self.mean_length).tolist()

    @property
    def flops(self) -> float:
        scores = sum(length**2 for length in self.lengths)
        forward = 4.0 * self.heads * scores * self.head_dim
        forward *= 0.5 if self.variant == "causal" else 1.0
        return forward * {"forward": 1.0, "backward": 2.5, "training": 3.5}[self.direction]

    @property
    def bytes(self) -> float:
        return self._sequence(sum(self.lengths)).bytes

    def _sequence(self, length: int) -> Attention:
        return Attention(
            dtype=self.dtype, device=self.device, direction=self.direction, batch=1,
            heads=self.heads, heads_kv=self.heads_kv, seqlen_q=length, seqlen_k=length,
            head_dim=self.head_dim, variant=self.variant,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        total, lengths = sum(self.lengths), torch.tensor(self.lengths)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return {
            "q": self.draw(total, self.heads, self.head_dim),
            "k": self.draw(total, self.heads_kv, self.head_dim),
            "v": self.draw(total, self.heads_kv, self.head_dim),
            "cu_seqlens": starts.to(self.device),
        }

    def part(self, name: str, x: Tensor) -> Tensor:
        """The last two sequences, and the last key head with the query heads that share it."""
        rows = sum(self.lengths[-2:])
        if name == "cu_seqlens":
            return x[-3:] - x[-3:][0]
        return (
            x[-rows:, -(self.heads // self.heads_kv) :] if name in ("q", "out") else x[-rows:, -1:]
        )

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        bounds = tensors["cu_seqlens"].tolist()
        outs, lses = [], []
        for start, end in itertools.pairwise(bounds):
            q, k, v = (tensors[name][None, start:end].transpose(1, 2) for name in "qkv")
            out, lse, _ = self._sequence(end - start).formula(q=q, k=k, v=v)
            assert out is not None
            assert lse is not None
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
        return torch.cat(outs), torch.cat(lses), None

    def noise(
        self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> list[float] | None:
        # One batch element with the rows in the place of the length: the noise is a row's.
        out, lse, _ = outputs
        assert out is not None
        assert lse is not None
        dense = (out.transpose(0, 1)[None], lse.transpose(0, 1)[None], None)
        return self._sequence(1).noise(dense, inputs)

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        tensors = with_flags(self, tensors)
        q, k, v = (tensors[name].transpose(0, 1)[None] for name in "qkv")
        starts = tensors["cu_seqlens"]
        operands = Operands(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)
        scalars = Scalars(
            "lower_right" if self.variant == "causal" else False,
            max_seqlen_q=self.seqlen,
            max_seqlen_k=self.seqlen,
            layout="blhd",
        )
        return our_sides(BACKENDS, call.problem_of(operands, scalars), self._prepare)

    def _prepare(self, backend: str, tensors: dict[str, Tensor]) -> Prepared:
        q, k, v, starts = (tensors[name] for name in ("q", "k", "v", "cu_seqlens"))
        causal: Causal = "lower_right" if self.variant == "causal" else False
        run = functools.partial(
            attention_varlen, q, k, v, starts, starts, self.seqlen, self.seqlen,
            causal=causal, backend=backend,
        )  # fmt: skip
        return Prepared(run, leaves(self, tensors))
