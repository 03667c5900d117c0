"""Norm calls as data: a case knows its tensors, its plain PyTorch formula and how to run it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.layer_norm import BACKENDS, call, reference
from fused_attn.ops.layer_norm.problem import Operands, Options
from fused_attn.testing import check_against_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RNG = (123_456_789_012_345, 77)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        dims: number of normalised dimensions.
        residual: None, "post" (y is returned) or "pre" (y and the sum are returned).
        strides: "dense", "every other" element of each row, or rows and columns "transposed".
        residual_dtype, weight_dtype: of residual and of weight and bias; x's if None.
    """

    shape: tuple[int, ...] = (5, 48)
    dims: int = 1
    dtype: torch.dtype = torch.float32
    rms: bool = False
    residual: str | None = None
    weight: bool = True
    bias: bool = True
    dropout_p: float = 0.0
    strides: str = "dense"
    residual_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    eps: float = 1e-5

    @property
    def row(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.dims :]

    def tensors(self, requires_grad: bool = True) -> dict[str, Tensor]:
        tensors = {"x": self._operand(self.shape, self.dtype)}
        if self.residual is not None:
            tensors["residual"] = self._operand(self.shape, self.residual_dtype or self.dtype)
        parameter_dtype = self.weight_dtype or self.dtype
        if self.weight:
            tensors["weight"] = torch.randn(self.row).to(parameter_dtype)
        if self.bias and not self.rms:
            tensors["bias"] = torch.randn(self.row).to(parameter_dtype)
        return {name: x.detach().requires_grad_(requires_grad) for name, x in tensors.items()}

    def _operand(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.strides == "every other":
            return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
        if self.strides == "transposed":
            return torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape) - 1, -1, -1))
        return torch.randn(shape).to(dtype)

    def run(
        self,
        backend: str | None,
        x: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """y, or y and the sum."""
        if residual is None:
            if self.rms:
                return (fused_attn.rms_norm(x, self.row, weight, self.eps, backend=backend),)
            return (fused_attn.layer_norm(x, self.row, weight, bias, self.eps, backend=backend),)
        parameters = (weight,) if self.rms else (weight, bias)
        add = fused_attn.add_rms_norm if self.rms else fused_attn.add_layer_norm
        results = add(
            x,
            residual,
            self.row,
            *parameters,
            self.eps,
            dropout_p=self.dropout_p,
            dropout_rng=torch.tensor(RNG),
            return_sum=self.residual == "pre",
            backend=backend,
        )
        return results if self.residual == "pre" else (results,)

    def plain(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The same by torch's own functions, in the dtype that it is given."""
        h = x
        if self.dropout_p and residual is not None:
            options = Options(self.dims, self.eps, self.rms, self.dropout_p)
            keep = reference.keep_mask(torch.tensor(RNG), options, x.shape)
            h = torch.where(keep, h / (1.0 - self.dropout_p), 0.0)
        if residual is not None:
            h = h + residual
        if self.rms:
            y = F.rms_norm(h, self.row, weight, self.eps)
        else:
            y = F.layer_norm(h, self.row, weight, bias, self.eps)
        return (y, h) if self.residual == "pre" else (y,)

    def check(self, backend: str) -> None:
        """Results and gradients against the float64 oracle."""
        tensors = self.tensors()
        self._skip_unless_supported(backend, tensors)
        names = ("y", "sum") if self.residual == "pre" else ("y",)

        def ours(**tensors: Tensor) -> tuple[Tensor, ...]:
            return self.run(backend, **tensors)

        if self.dtype == torch.float64:
            self._check_exactly(ours, tensors)
        else:
            check_against_oracle(ours, self.plain, tensors, names)

    def _skip_unless_supported(self, backend: str, tensors: dict[str, Tensor]) -> None:
        rng = torch.tensor(RNG) if self.dropout_p else None
        scalars = call.Scalars(self.row, self.eps, self.rms, self.dropout_p)
        problem = call.problem_of(Operands(**tensors, dropout_rng=rng), scalars)
        if reasons := dispatch.find(BACKENDS, backend).why_not(problem):
            pytest.skip("; ".join(reasons))

    def _check_exactly(self, ours, tensors: dict[str, Tensor]) -> None:
        """float64 has no better oracle: equal to plain PyTorch but for the order of additions."""
        results = []
        for function in (ours, self.plain):
            outputs = function(**tensors)
            loss = sum(output.sin().sum() for output in outputs)
            grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
            results.append((*outputs, *grads))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def served_dtypes(backend: str) -> list[torch.dtype]:
    """Those of `DTYPES` that `backend` runs."""
    served = []
    for dtype in DTYPES:
        operands = Operands(torch.zeros(1, 1, dtype=dtype))
        problem = call.problem_of(operands, call.Scalars(1, 1e-5, False))
        if not dispatch.find(BACKENDS, backend).why_not(problem):
            served.append(dtype)
    return served


def finest_dtype(backend: str) -> torch.dtype:
    """float64 if `backend` serves it, else float32."""
    return torch.float64 if torch.float64 in served_dtypes(backend) else torch.float32


def random_case(seed: int) -> Case:
    """Any combination of everything, small enough to be quick."""
    pick = random.Random(seed)
    dims = pick.choice((1, 1, 1, 2))
    shape = tuple(pick.choice((0, 1, 2, 3, 5)) for _ in range(pick.randint(0, 3)))
    row = [pick.choice((1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 100, 129, 300))]
    if dims == 2:
        row = [pick.choice((1, 3, 8)), pick.choice((1, 7, 16, 33))]
    dtype = pick.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    residual = pick.choice((None, "post", "pre"))
    case = Case(
        shape=(*shape, *row),
        dims=dims,
        dtype=dtype,
        rms=pick.random() < 0.4,
        residual=residual,
        weight=pick.random() < 0.8,
        bias=pick.random() < 0.6,
        dropout_p=pick.choice((0.0, 0.0, 0.1, 0.5)) if residual else 0.0,
        strides=pick.choice(("dense", "dense", "every other", "transposed")),
        eps=pick.choice((1e-5, 1e-6, 1e-2)),
    )
    # Without a weight torch's own backward refuses a bias of another dtype.
    if dtype in (torch.bfloat16, torch.float16) and case.weight:
        case = replace(case, weight_dtype=pick.choice((None, torch.float32)))
        if case.weight_dtype and residual:
            case = replace(case, residual_dtype=pick.choice((None, torch.float32)))
    return case
