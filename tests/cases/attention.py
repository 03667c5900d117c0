"""Attention calls to test: a compact description, and the tensors that it stands for.

A `Case` is printable as the one line that rebuilds it, so that any failure can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.ops import dispatch
from fused_attn.ops.attention import BACKENDS, call, reference
from fused_attn.ops.attention.call import Scalars
from fused_attn.ops.attention.problem import Operands


@dataclass(frozen=True)
class Case:
    """Sizes and operands of one call; `bias` and `mask` say which dimensions are broadcast.

    `mask="b1qk"` is a mask of shape (B, 1, Lq, Lk); None is no mask. `mask_tile`: half of its tiles
    of so many queries and keys are hidden as a whole.
    """

    batch: int = 2
    num_heads: int = 2
    num_heads_kv: int = 2
    seqlen_q: int = 40
    seqlen_k: int = 40
    head_dim: int = 16
    head_dim_v: int | None = None
    causal: Any = False
    window: tuple[int, int] | None = None
    padding: str | None = None  # "mask", "lengths", "holes", "empty" (one sequence all padding)
    mask: str | None = None
    mask_tile: int | None = None
    bias: str | None = None
    alibi: bool = False
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    layout: str = "bhld"  # "bhld", "blhd" (heads by strides), "expanded", "strided" (last stride 2)
    weights: str | None = None
    seed: int = 0
    learned_alibi: bool = False  # the slopes want a gradient
    sinks: bool = False
    chunk: int | None = None
    documents: str | None = None  # "runs" (one after the other, as in packed rows) or "mixed"
    prefix: bool = False  # it wants `causal` or `window`

    def scalars(self, backend: str | None = None) -> Scalars:
        return Scalars(
            self.causal,
            self.window,
            self.softcap,
            self.scale,
            self.dropout_p,
            self.weights,
            backend,
            return_lse=True,
            chunk=self.chunk,
        )

    def tensors(self, dtype: torch.dtype, requires_grad: bool = True) -> dict[str, Tensor]:
        """Operands by name; q, k, v and bias in `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        full = {
            "b": self.batch,
            "h": self.num_heads,
            "q": self.seqlen_q,
            "k": self.seqlen_k,
        }
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v

        def randn(*shape: int) -> Tensor:
            # Drawn in one precision and rounded, so that every dtype sees nearly the same numbers.
            return torch.randn(shape, generator=generator).to(dtype)

        def shape_of(spec: str) -> tuple[int, ...]:
            return tuple(1 if letter == "1" else full[letter] for letter in spec)

        tensors = {
            "q": self._lay_out(randn(self.batch, self.num_heads, self.seqlen_q, self.head_dim)),
            "k": self._lay_out(randn(self.batch, self.num_heads_kv, self.seqlen_k, self.head_dim)),
            "v": self._lay_out(randn(self.batch, self.num_heads_kv, self.seqlen_k, head_dim_v)),
        }
        if self.bias is not None:
            tensors["bias"] = randn(*shape_of(self.bias))
        for tensor in tensors.values():
            tensor.requires_grad_(requires_grad)
        if self.mask is not None:
            tensors["mask"] = torch.rand(shape_of(self.mask), generator=generator) < 0.7
            if self.mask_tile is not None:
                tensors["mask"] &= self._shown_tiles(tensors["mask"].shape)
        tensors.update(self._padding(generator))
        if self.alibi or self.learned_alibi:
            slopes = 2.0 ** -torch.arange(1.0, self.num_heads + 1)
            tensors["alibi_slopes"] = slopes.requires_grad_(self.learned_alibi and requires_grad)
        if self.sinks:
            tensors["sinks"] = randn(self.num_heads).requires_grad_(requires_grad)
        tensors.update(self._positions())
        if self.dropout_p:
            tensors["dropout_rng"] = torch.randint(0, 2**62, (2,), generator=generator)
        return tensors

    def _positions(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(-1 - self.seed)
        found = {}
        for name, length in (("query", self.seqlen_q), ("key", self.seqlen_k)):
            if self.documents is not None:
                ids = torch.randint(0, 3, (self.batch, length), generator=generator)
                if self.documents == "runs":
                    ids = ids.sort(dim=1).values
                found[f"{name}_documents"] = ids
        if self.prefix:
            high = self.seqlen_k + 1
            found["prefix_lengths"] = torch.randint(0, high, (self.batch,), generator=generator)
        return found

    def _shown_tiles(self, shape: torch.Size) -> Tensor:
        tile, generator = self.mask_tile, torch.Generator().manual_seed(self.seed)
        counts = (*shape[:2], -(-shape[2] // tile), -(-shape[3] // tile))
        shown = torch.rand(counts, generator=generator) < 0.5
        shown = shown.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        return shown[..., : shape[2], : shape[3]]

    def _lay_out(self, tensor: Tensor) -> Tensor:
        if self.layout == "blhd":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "expanded":
            return tensor[:1].expand(self.batch, -1, -1, -1)
        if self.layout == "strided":
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        return tensor

    def _padding(self, generator: torch.Generator) -> dict[str, Tensor]:
        if self.padding is None:
            return {}
        high = self.seqlen_k + 1
        lengths = torch.randint(0, high, (self.batch,), generator=generator)
        if self.padding == "lengths":
            return {"key_lengths": lengths}
        if self.padding == "empty" and self.batch:
            lengths[0] = 0
        position = torch.arange(self.seqlen_k)
        if self.padding == "holes":
            draws = torch.rand(self.batch, self.seqlen_k, generator=generator)
            return {"key_padding_mask": draws < 0.6}
        return {"key_padding_mask": position < lengths[:, None]}


def run_backend(case: Case, backend: str, **tensors: Tensor) -> tuple[Tensor | None, ...]:
    """out, lse and weights of `case` by `backend`, the way the public functions run it."""
    return call.run(Operands(**tensors), case.scalars(backend))


def run_plain(case: Case, **tensors: Tensor) -> tuple[Tensor | None, ...]:
    """The same in plain PyTorch, all of it in the dtype of the tensors."""
    operands = Operands(**tensors)
    if operands.alibi_slopes is not None:
        operands = operands._replace(alibi_slopes=operands.alibi_slopes.float())
    problem = call.problem_of(operands, case.scalars())
    compute_dtype = operands.q.dtype
    return reference.forward(operands, problem.options, problem.weights, compute_dtype)


def skip_unless_supported(case: Case, backend: str, tensors: dict[str, Tensor]) -> None:
    """Skip the test with the backend's own reasons for not running `case`."""
    problem = call.asked_of_backends(Operands(**tensors), case.scalars())
    reasons = dispatch.why_not(dispatch.find(BACKENDS, backend), problem)
    if reasons:
        pytest.skip("; ".join(reasons))


def finest_dtype(backend: str) -> torch.dtype:
    """float64 if `backend` serves it, else float32."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    problem = call.problem_of(Operands(x, x, x), Scalars())
    refuses = dispatch.find(BACKENDS, backend).why_not(problem)
    return torch.float32 if refuses else torch.float64
