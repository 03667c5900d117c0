"""Embedding calls as data: a case knows its tensors, its plain PyTorch formula, how to run it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.runtime import philox
from fused_attn.testing import check_against_oracle

RNG = (123_456_789_012_345, 77)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        table: "counted" or "given" positions, or None for no table.
        strides: "dense", or "every other" element of each row of weight, table and tokens.
        table_dtype: the weight's if None.
    """

    shape: tuple[int, ...] = (3, 7)
    num_tokens: int = 11
    num_positions: int = 9
    width: int = 48
    dtype: torch.dtype = torch.float32
    table: str | None = "counted"
    scale: float = 3.0
    offset: int = 0
    padding_idx: int | None = None
    dropout_p: float = 0.0
    strides: str = "dense"
    table_dtype: torch.dtype | None = None

    def tensors(self, requires_grad: bool = True) -> dict[str, Tensor]:
        tensors = {"weight": self._rows(self.num_tokens, self.dtype)}
        if self.table is not None:
            tensors["table"] = self._rows(self.num_positions, self.table_dtype or self.dtype)
        for tensor in tensors.values():
            tensor.requires_grad_(requires_grad)
        tensors["tokens"] = self._indices(self.num_tokens)
        if self.table == "given":
            tensors["positions"] = self._indices(self.num_positions)
        return tensors

    def _rows(self, rows: int, dtype: torch.dtype) -> Tensor:
        step = 2 if self.strides == "every other" else 1
        return torch.randn(rows, step * self.width).to(dtype)[:, ::step].detach()

    def _indices(self, limit: int) -> Tensor:
        step = 2 if self.strides == "every other" else 1
        shape = (*self.shape[:-1], step * self.shape[-1])
        return torch.randint(limit, shape)[..., ::step]

    def run(self, backend: str | None, **tensors: Tensor) -> tuple[Tensor]:
        y = fused_attn.embedding(
            **tensors,
            scale=self.scale,
            offset=self.offset,
            padding_idx=self.padding_idx,
            dropout_p=self.dropout_p,
            dropout_rng=torch.tensor(RNG) if self.dropout_p else None,
            backend=backend,
        )
        return (y,)

    def plain(
        self,
        weight: Tensor,
        tokens: Tensor,
        table: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor]:
        """The same by torch's own functions, in the dtype that it is given."""
        y = F.embedding(tokens, weight, self.padding_idx) * self.scale
        if table is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[-1]) + self.offset
            y = y + F.embedding(positions, table)
        if self.dropout_p:
            rows = y.shape[:-1].numel()
            keep = philox.kept_in_rows(torch.tensor(RNG), self.dropout_p, rows, self.width)
            y = torch.where(keep.view(y.shape), y / (1.0 - self.dropout_p), 0.0)
        return (y,)

    def check(self, backend: str) -> None:
        """Results and gradients against the float64 oracle."""
        tensors = self.tensors()
        if self.dtype != torch.float64:
            check_against_oracle(
                lambda **tensors: self.run(backend, **tensors), self.plain, tensors, ("y",)
            )
            return
        # float64 has no better oracle: equal to plain PyTorch but for the order of additions.
        wanted = [x for x in tensors.values() if x.requires_grad]
        results = []
        for (y,) in (self.run(backend, **tensors), self.plain(**tensors)):
            results.append((y, *torch.autograd.grad(y.sin().sum(), wanted)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def random_case(seed: int) -> Case:
    """Any combination of everything, small enough to be quick."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    length = pick.choice((0, 1, 2, 5, 9))
    offset = pick.choice((0, 0, 3))
    table = pick.choice((None, "counted", "given"))
    num_tokens = pick.choice((1, 2, 30))
    return Case(
        shape=(*(pick.choice((0, 1, 3)) for _ in range(pick.randint(0, 2))), length),
        num_tokens=num_tokens,
        num_positions=length + offset + pick.choice((1, 4)),
        width=pick.choice((1, 3, 15, 16, 17, 64, 65, 130)),
        dtype=pick.choice((torch.float32, torch.bfloat16, torch.float16)),
        table=table,
        scale=pick.choice((1.0, 22.6, -0.5)),
        offset=0 if table == "given" else offset,
        padding_idx=pick.choice((None, 0, -1, num_tokens - 1)),
        dropout_p=pick.choice((0.0, 0.0, 0.3)),
        strides=pick.choice(("dense", "every other")),
    )
