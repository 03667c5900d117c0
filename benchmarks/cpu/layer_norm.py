"""Residual + LayerNorm against torch's add and layer norm; buffers reused on both sides.

Fresh outputs of many megabytes cost page faults that hide the kernel, so neither side allocates in
the forward. The backward is timed alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_attn
from fused_attn.testing import assert_within_budget

from .row import BF16, FP32, SHORT_NAMES, Row, Side, check

EPS = 1e-5


def _tensors(dtype: torch.dtype, rows: int, width: int, grad: bool) -> list[Tensor]:
    shapes = ((rows, width), (rows, width), (width,), (width,))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def _compare(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    x, residual = x[:64].detach(), residual[:64].detach()
    weight, bias = weight.detach(), bias.detach()
    width = (x.shape[1],)
    ours = fused_attn.add_layer_norm(x, residual, width, weight, bias)
    plain = F.layer_norm(x + residual, width, weight, bias, EPS)
    exact = x.double() + residual.double()
    exact = F.layer_norm(exact, width, weight.double(), bias.double(), EPS)
    assert_within_budget("y", ours, plain, exact)


def _forward(dtype: torch.dtype, rows: int, width: int) -> dict[str, Side]:
    x, residual, weight, bias = _tensors(dtype, rows, width, grad=False)
    y, h = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(rows, 1, dtype=dtype)
    rstd = torch.empty(rows, 1, dtype=dtype)

    def ours() -> None:
        fused_attn.add_layer_norm(x, residual, (width,), weight, bias, EPS, out=y, sum_out=h)

    def theirs() -> None:
        torch.add(x, residual, out=h)
        torch.ops.aten.native_layer_norm.out(h, (width,), weight, bias, EPS, out0=y, out1=mean, out2=rstd)

    correct = check(functools.partial(_compare, x, residual, weight, bias))
    return {"ours": Side(ours, correct), "add + norm": Side(theirs)}


def _backward(dtype: torch.dtype, rows: int, width: int) -> dict[str, Side]:
    tensors = _tensors(dtype, rows, width, grad=True)
    x, residual, weight, bias = tensors
    dy = torch.randn(rows, width).to(dtype)
    mine = fused_attn.add_layer_norm(x, residual, (width,), weight, bias, EPS)
    torchs = F.layer_norm(x + residual, (width,), weight, bias, EPS)

    def gradients(y: Tensor) -> None:
        torch.autograd.grad(y, tensors, dy, retain_graph=True)

    correct = check(functools.partial(_compare, *tensors))
    return {
        "ours": Side(functools.partial(gradients, mine), correct),
        "add + norm": Side(functools.partial(gradients, torchs)),
    }


def rows() -> list[Row]:
    result = []

    def add(label: str, gate: float, goal: float, dtype: torch.dtype, *size: int) -> None:
        build = _forward if label == "fwd" else _backward
        name = f"{SHORT_NAMES[dtype]} add+layer_norm {label} {size[0]}x{size[1]}"
        # Forward: x and residual in, y and the sum out. Backward: dy, x and residual in, dx out.
        moved = 4.0 * size[0] * size[1] * dtype.itemsize
        made = functools.partial(build, dtype, *size)
        result.append(Row(name, gate, goal, dtype, made, bytes=moved))

    add("fwd", 3.0, 5.0, FP32, 8192, 1024)
    add("fwd", 1.7, 2.2, FP32, 4096, 768)
    add("fwd", 1.7, 2.4, BF16, 8192, 1024)
    add("fwd", 1.7, 2.4, BF16, 4096, 768)
    add("bwd", 1.5, 2.0, FP32, 4096, 768)
    add("bwd", 1.9, 3.0, BF16, 4096, 768)
    return result
