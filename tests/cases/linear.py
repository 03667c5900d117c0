"""Linear calls as data: a case knows its tensors, its plain PyTorch formula, how to run it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.ops.linear import reference
from fused_attn.ops.linear.problem import Operands, Options
from fused_attn.testing import check_against_oracle, output_gradients

RNG = torch.tensor([7, 11])


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        shape: of x, without its last dimension.
        strides: "dense"; "columns": x and weight lie column after column; "every other" element of
            each row; "permuted": the first two dimensions of x are exchanged in memory.
        activation, gated, residual, dropout_p: what comes after the product.
    """

    shape: tuple[int, ...] = (3, 7)
    width_in: int = 24
    width_out: int = 40
    dtype: torch.dtype = torch.float32
    bias: bool = True
    strides: str = "dense"
    activation: str | None = None
    gated: bool = False
    residual: bool = False
    dropout_p: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        x = self._matrix(*self.shape, self.width_in)
        width = 2 * self.width_out if self.gated else self.width_out
        weight = self._matrix(width, self.width_in) / max(self.width_in, 1) ** 0.5
        tensors = {"x": x, "weight": weight}
        if self.bias:
            tensors["bias"] = torch.randn(width)
        if self.residual:
            tensors["residual"] = self._matrix(*self.shape, self.width_out)
        return {n: t.to(self.dtype).detach().requires_grad_() for n, t in tensors.items()}

    def _matrix(self, *shape: int) -> Tensor:
        if self.strides == "columns":
            return torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2) \
                if len(shape) > 1 else torch.randn(*shape)  # fmt: skip
        if self.strides == "every other":
            return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
        if self.strides == "permuted" and len(shape) > 2:
            return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        return torch.randn(*shape)

    def run(self, backend: str | None, **tensors: Tensor) -> tuple[Tensor]:
        return (
            fused_attn.linear(
                **tensors, backend=backend, activation=self.activation, gated=self.gated,
                dropout_p=self.dropout_p, dropout_rng=RNG if self.dropout_p else None,
            ),
        )  # fmt: skip

    def plain(self, **tensors: Tensor) -> tuple[Tensor]:
        """In the dtype of the tensors, as torch computes it."""
        h = F.linear(tensors["x"], tensors["weight"], tensors.get("bias"))
        rng = RNG if self.dropout_p else None
        how = Options(self.activation or "", self.gated, self.dropout_p)
        y = reference.after_product(h, Operands(**tensors, dropout_rng=rng), how)
        return (y if "residual" not in tensors else y + tensors["residual"],)

    def check(self, backend: str | None) -> None:
        check_against_oracle(
            lambda **x: self.run(backend, **x), self.plain, self.tensors(), ("y",), self._noise
        )

    def _noise(
        self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], dtype: torch.dtype
    ) -> list[float]:
        """What the order of a sum of n products makes of it: about sqrt(n) u sum |a| |b|.

        (Higham, Mary 2019, "A new approach to probabilistic rounding error analysis".) Plain
        PyTorch may be exact by luck where there is one number to compute.
        """
        u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
        dy = output_gradients(outputs)[0]
        assert dy is not None
        sizes = [t.detach().abs().requires_grad_() for t in inputs]
        x, weight, *rest = sizes
        y = F.linear(x, weight, rest.pop(0) if self.bias else None)
        if self.activation is not None:  # no slope is above 1.2
            y = 1.2 * y
        if self.gated:
            y = math.prod(y.chunk(2, dim=-1))
        if 0 < self.dropout_p < 1:
            y = y / (1 - self.dropout_p)
        y = y + rest[0] if rest else y
        rows = math.prod(self.shape)
        sums = [y, *torch.autograd.grad(y, sizes, dy.abs())]
        terms = (self.width_in, len(weight), rows, rows, 1)
        return [
            n**0.5 * u * float(s.detach().max()) if s.numel() else 0.0
            for n, s in zip(terms, sums, strict=False)
        ]


def random_case(seed: int) -> Case:
    choose = random.Random(seed)
    sizes = (1, 2, 5, 6, 7, 15, 16, 17, 33, 64, 95, 97, 130, 255, 256, 257, 300, 515)
    shape = tuple(choose.choice((1, 2, 3, 6, 7, 13, 50)) for _ in range(choose.randint(0, 3)))
    after: dict[str, Any] = {}
    if choose.random() < 0.5:
        after = {
            "activation": choose.choice((None, "relu", "gelu", "gelu_tanh", "silu")),
            "residual": choose.random() < 0.4,
            "dropout_p": choose.choice((0.0, 0.0, 0.3, 1.0)),
        }
        after["gated"] = after["activation"] is not None and choose.random() < 0.4
    return Case(
        shape=shape,
        width_in=choose.choice(sizes),
        width_out=choose.choice(sizes),
        dtype=choose.choice((torch.float32, torch.bfloat16, torch.float16)),
        bias=choose.random() < 0.7,
        strides=choose.choice(("dense", "dense", "columns", "every other", "permuted")),
        **after,
    )
