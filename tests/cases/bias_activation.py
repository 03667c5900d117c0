"""Calls of bias + activation as data: a case knows its tensors, its formula and how to run it."""

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

PLAIN = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        shape: of y.
        bias_dtype: of the bias; x's if None.
        strides: "dense", "every other" element of each row, or rows and columns "transposed".
    """

    activation: str = "gelu"
    shape: tuple[int, ...] = (5, 48)
    dtype: torch.dtype = torch.float32
    gated: bool = False
    bias: bool = True
    dropout_p: float = 0.0
    strides: str = "dense"
    bias_dtype: torch.dtype | None = None

    @property
    def width_in(self) -> int:
        return self.shape[-1] * (2 if self.gated else 1)

    def tensors(self, requires_grad: bool = True) -> dict[str, Tensor]:
        tensors = {"x": self._lay_out((*self.shape[:-1], self.width_in))}
        if self.bias:
            tensors["bias"] = torch.randn(self.width_in).to(self.bias_dtype or self.dtype)
        return {name: x.detach().requires_grad_(requires_grad) for name, x in tensors.items()}

    def _lay_out(self, shape: tuple[int, ...]) -> Tensor:
        if self.strides == "every other":
            return (2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(self.dtype)[..., ::2]
        if self.strides == "transposed":
            reverse = tuple(range(len(shape) - 1, -1, -1))
            return (2 * torch.randn(shape[::-1])).to(self.dtype).permute(reverse)
        return (2 * torch.randn(shape)).to(self.dtype)

    def run(self, backend: str | None, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return fused_attn.bias_activation(
            x,
            bias,
            activation=self.activation,
            gated=self.gated,
            dropout_p=self.dropout_p,
            dropout_rng=torch.tensor(RNG),
            backend=backend,
        )

    def plain(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same by torch's own functions, in the dtype that it is given."""
        h = x if bias is None else x + bias
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            y = PLAIN[self.activation](gate) * up
        else:
            y = PLAIN[self.activation](h)
        if self.dropout_p:
            rows = y.numel() // y.shape[-1] if y.shape[-1] else 0
            keep = philox.kept_in_rows(torch.tensor(RNG), self.dropout_p, rows, y.shape[-1])
            y = torch.where(keep.reshape(y.shape), y / (1.0 - self.dropout_p), 0.0)
        return y

    def check(self, backend: str) -> None:
        """Results and gradients against the float64 oracle."""
        check_against_oracle(
            lambda **tensors: (self.run(backend, **tensors),),
            lambda **tensors: (self.plain(**tensors),),
            self.tensors(),
            ("y",),
        )


def random_case(seed: int) -> Case:
    """Any combination of everything, small enough to be quick."""
    pick = random.Random(seed)
    leading = tuple(pick.choice((0, 1, 2, 3, 5, 9)) for _ in range(pick.randint(0, 3)))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return Case(
        activation=pick.choice(list(PLAIN)),
        shape=(*leading, pick.choice((1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 100, 129, 300))),
        dtype=pick.choice(dtypes),
        gated=pick.random() < 0.4,
        bias=pick.random() < 0.7,
        dropout_p=pick.choice((0.0, 0.0, 0.1, 0.5)),
        strides=pick.choice(("dense", "dense", "every other", "transposed")),
        bias_dtype=pick.choice((None, None, *dtypes)),
    )
