"""Attention as a problem: q, k, v and one kind of mask, alone or beside causal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_attn.ops.attention import BACKENDS, call, reference
from fused_attn.ops.attention.api import attention
from fused_attn.ops.attention.call import Scalars
from fused_attn.ops.attention.problem import Operands
from fused_attn.testing import attention_noise

from ..problem import Prepared, Problem, Side, leaves, with_flags
from .sides import our_sides

VARIANTS = ("full", "causal", "padding", "mask", "bias", "alibi", "window", "softcap")
MEAN_LENGTH = 0.6  # of the longest, in padded and packed batches: BERT's in the field's tables
SOFTCAP = 30.0


@dataclass(frozen=True, kw_only=True)
class Attention(Problem):
    """softmax(q k^T / sqrt(D)) v, forward or backward.

    Attributes:
        variant: one of `VARIANTS`. "padding": key padding, mean length 0.6; "mask": random bool
            (1, 1, Lq, Lk), half of it visible; "bias": (1, H, Lq, Lk), with its gradient in a
            backward; "window": causal, the last Lk // 4 keys.
        mean_length: of "padding", over the longest.
    """

    operation: ClassVar[str] = "attention"
    differentiable: ClassVar[tuple[str, ...]] = ("q", "k", "v", "bias")

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    variant: str = "full"
    mean_length: float = MEAN_LENGTH

    @property
    def bound(self) -> str:  # type: ignore[override]
        return "memory" if self.seqlen_q == 1 else "compute"

    @property
    def size(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        same = self.seqlen_q == self.seqlen_k
        length = f"{self.seqlen_k}" if same else f"{self.seqlen_q}:{self.seqlen_k}"
        variant = "" if self.variant == "full" else f" {self.variant}{of_length(self.mean_length)}"
        return f"{self.batch}x{heads}x{length}x{self.head_dim}{variant}"

    def columns(self) -> dict[str, object]:
        names = ("batch", "heads", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "variant")
        return {name: getattr(self, name) for name in names}

    @property
    def causal(self) -> bool:
        return self.variant in ("causal", "window")

    @property
    def window(self) -> tuple[int, int] | None:
        return (self.seqlen_k // 4, 0) if self.variant == "window" else None

    def visible(self) -> float:
        """Share of the scores that somebody sees, by rows and columns (a random mask counts 1)."""
        if self.variant == "window":
            left = self.seqlen_k // 4
            return (left + 1) * (self.seqlen_k - left / 2) / self.seqlen_k**2
        return {"causal": 0.5, "padding": self.mean_length}.get(self.variant, 1.0)

    @property
    def flops(self) -> float:
        rows = float(self.batch * self.heads * self.seqlen_q)
        forward = 4.0 * rows * self.seqlen_k * self.head_dim * self.visible()
        return forward * {"forward": 1.0, "backward": 2.5, "training": 3.5}[self.direction]

    @property
    def bytes(self) -> float:
        """q, k, v read and out written once; the backward also reads dout and writes gradients."""
        queries = self.batch * self.heads * self.seqlen_q
        keys = self.batch * self.heads_kv * self.seqlen_k
        forward = 2 * (queries + keys)
        moved = {
            "forward": forward,
            "backward": 4 * queries + 4 * keys,
            "training": forward + 4 * queries + 4 * keys,
        }
        return float(moved[self.direction] * self.head_dim * self.dtype.itemsize)

    def tensors(self) -> dict[str, Tensor]:
        keys = (self.batch, self.heads_kv, self.seqlen_k, self.head_dim)
        tensors = {
            "q": self.draw(self.batch, self.heads, self.seqlen_q, self.head_dim),
            "k": self.draw(*keys),
            "v": self.draw(*keys),
        }
        scores = (self.seqlen_q, self.seqlen_k)
        if self.variant == "padding":
            lengths = padded_lengths(self.batch, self.seqlen_k, self.mean_length)
            position = torch.arange(self.seqlen_k)
            tensors["key_padding_mask"] = (position < lengths[:, None]).to(self.device)
        elif self.variant == "mask":
            mask = torch.rand(1, 1, *scores) < 0.5
            mask[..., 0] = True  # no row is left without a key: torch's math path gives it NaN
            tensors["mask"] = mask.to(self.device)
        elif self.variant == "bias":
            tensors["bias"] = self.draw(1, self.heads, *scores)
        elif self.variant == "alibi":
            powers = 8.0 * torch.arange(1.0, self.heads + 1) / self.heads
            tensors["alibi_slopes"] = torch.exp2(-powers).to(self.device)
        return tensors

    def scalars(self, backend: str | None = None) -> Scalars:
        return Scalars(
            "lower_right" if self.causal else False,
            self.window,
            SOFTCAP if self.variant == "softcap" else None,
            backend=backend,
            return_lse=True,
        )

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        operands = Operands(**tensors)
        if operands.alibi_slopes is not None:
            operands = operands._replace(alibi_slopes=operands.alibi_slopes.float())
        options = call.problem_of(operands, self.scalars()).options
        return reference.forward(operands, options, compute_dtype=operands.q.dtype)

    def part(self, name: str, x: Tensor) -> Tensor:
        """The last batch element, and the last key head with the query heads that share it."""
        group = self.heads // self.heads_kv
        if name in ("q", "out"):
            return x[-1:, -group:]
        if name in ("k", "v"):
            return x[-1:, -1:]
        if name == "key_padding_mask":
            return x[-1:]
        if name == "bias":
            return x[:, -group:]
        return x[-group:] if name == "alibi_slopes" else x

    def checked(self) -> Problem:
        # A bias's gradient is a sum over the batch, which a part of the batch does not have.
        return self.replace(batch=1) if self.variant == "bias" else self

    def noise(
        self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> list[float] | None:
        out, _, _, *gradients = attention_noise(outputs, inputs, self.dtype)
        return [out, *gradients]

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Those of our public function besides q, k and v."""
        extra: dict[str, Any] = {
            name: x for name, x in tensors.items() if name not in ("q", "k", "v")
        }
        if self.causal:
            extra["causal"] = "lower_right"
        if self.window is not None:
            extra["window"] = self.window
        if self.variant == "softcap":
            extra["softcap"] = SOFTCAP
        return extra

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        operands = Operands(**with_flags(self, tensors))
        return our_sides(BACKENDS, call.problem_of(operands, self.scalars()), self.prepare)

    def prepare(self, backend: str | None, tensors: dict[str, Tensor]) -> Prepared:
        """Our call, by the backend of that name or by the one that is chosen."""
        q, k, v = (tensors[name] for name in "qkv")
        run = functools.partial(attention, q, k, v, **self.arguments(tensors), backend=backend)
        return Prepared(run, leaves(self, tensors))


@dataclass(frozen=True, kw_only=True)
class TinyCall(Attention):
    """Attention with next to nothing to compute: what a call costs, with the choice of backend."""

    operation: ClassVar[str] = "call"

    @property
    def bound(self) -> str:  # type: ignore[override]
        return "none"

    @property
    def flops(self) -> float:
        return 0.0

    @property
    def bytes(self) -> float:
        return 0.0

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        return [Side("fused_attn", functools.partial(self.prepare, None))]


def padded_lengths(batch: int, longest: int, mean: float = MEAN_LENGTH) -> Tensor:
    """Lengths spread evenly about `mean` of the longest; the first sequence has no padding."""
    spread = torch.linspace(1.0, 2 * mean - 1, batch) if batch > 1 else torch.ones(1)
    return (spread * longest).round().clamp(min=1).long()


def of_length(mean: float) -> str:
    """What a case's label says of the mean length, if it is not the usual one."""
    return "" if mean == MEAN_LENGTH else f" {mean:.2f}"
