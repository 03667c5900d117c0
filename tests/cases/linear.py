"""Linear calls as data: a case knows its tensors, its plain PyTorch formula, how to run it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.testing import check_against_oracle, output_gradients


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        shape: of x, without its last dimension.
        strides: "dense"; "columns": x and weight lie column after column; "every other" element of
            each row; "permuted": the first two dimensions of x are exchanged in memory.
    """

    shape: tuple[int, ...] = (3, 7)
    width_in: int = 24
    width_out: int = 40
    dtype: torch.dtype = torch.float32
    bias: bool = True
    strides: str = "dense"

    def tensors(self) -> dict[str, Tensor]:
        x = self._matrix(*self.shape, self.width_in)
        weight = self._matrix(self.width_out, self.width_in) / max(self.width_in, 1) ** 0.5
        tensors = {"x": x, "weight": weight}
        if self.bias:
            tensors["bias"] = torch.randn(self.width_out)
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
        return (fused_attn.linear(**tensors, backend=backend),)

    def plain(self, **tensors: Tensor) -> tuple[Tensor]:
        """In the dtype of the tensors, as torch computes it."""
        return (F.linear(tensors["x"], tensors["weight"], tensors.get("bias")),)

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
        x, weight, *bias = (t.detach().abs().requires_grad_() for t in inputs)
        y = F.linear(x, weight, *bias)
        rows, sizes = math.prod(self.shape), [x, weight, *bias]
        sums = [y, *torch.autograd.grad(y, sizes, dy.abs())]
        terms = (self.width_in, self.width_out, rows, rows)
        return [
            n**0.5 * u * float(s.max()) if s.numel() else 0.0
            for n, s in zip(terms, sums, strict=False)
        ]


def random_case(seed: int) -> Case:
    choose = random.Random(seed)
    sizes = (1, 2, 5, 6, 7, 15, 16, 17, 33, 64, 95, 97, 130, 255, 256, 257, 300, 515)
    shape = tuple(choose.choice((1, 2, 3, 6, 7, 13, 50)) for _ in range(choose.randint(0, 3)))
    return Case(
        shape=shape,
        width_in=choose.choice(sizes),
        width_out=choose.choice(sizes),
        dtype=choose.choice((torch.float32, torch.bfloat16, torch.float16)),
        bias=choose.random() < 0.7,
        strides=choose.choice(("dense", "dense", "columns", "every other", "permuted")),
    )
