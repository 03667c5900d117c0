"""Bias, GELU and dropout of a feed-forward against torch's three functions, and SwiGLU.

Buffers are reused on both sides in the forward, as `layer_norm.py` says; "train" is forward and
backward with dropout.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from fused_attn.testing import assert_within_budget

from .row import BF16, FP32, SHORT_NAMES, Row, Side, check

DROPOUT = 0.1


def _tensors(dtype: torch.dtype, rows: int, width: int, grad: bool) -> list[Tensor]:
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in ((rows, width), (width,))]


def _compare(gated: bool, x: Tensor, bias: Tensor) -> None:
    x, bias = x[:64].detach(), bias.detach()
    activation = "silu" if gated else "gelu"
    ours = fused_attn.bias_activation(x, bias, activation=activation, gated=gated)
    assert_within_budget(
        "y", ours, _plain(gated, x, bias), _plain(gated, x.double(), bias.double())
    )


def _plain(gated: bool, x: Tensor, bias: Tensor) -> Tensor:
    if not gated:
        return F.gelu(x + bias)
    gate, up = (x + bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def _forward(dtype: torch.dtype, rows: int, width: int, gated: bool) -> dict[str, Side]:
    x, bias = _tensors(dtype, rows, width, grad=False)
    h = torch.empty_like(x)
    y = torch.empty(rows, width // 2 if gated else width, dtype=dtype)
    activation = "silu" if gated else "gelu"

    def ours() -> None:
        fused_attn.bias_activation(x, bias, activation=activation, gated=gated, out=y)

    def theirs() -> None:
        torch.add(x, bias, out=h)
        if gated:
            gate, up = h.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=y)
            torch.mul(y, up, out=y)
        else:
            torch.ops.aten.gelu.out(h, out=y)

    correct = check(functools.partial(_compare, gated, x, bias))
    return {"ours": Side(ours, correct), "torch": Side(theirs)}


def _training(dtype: torch.dtype, rows: int, width: int, gated: bool) -> dict[str, Side]:
    tensors = _tensors(dtype, rows, width, grad=True)
    dy = torch.randn(rows, width // 2 if gated else width).to(dtype)
    activation = "silu" if gated else "gelu"

    def ours() -> None:
        y = fused_attn.bias_activation(
            *tensors, activation=activation, gated=gated, dropout_p=DROPOUT
        )
        torch.autograd.grad(y, tensors, dy)

    def theirs() -> None:
        torch.autograd.grad(F.dropout(_plain(gated, *tensors), DROPOUT), tensors, dy)

    correct = check(functools.partial(_compare, gated, *tensors))
    return {"ours": Side(ours, correct), "torch": Side(theirs)}


def rows() -> list[Row]:
    result = []
    for dtype in (FP32, BF16):
        for gated in (False, True):
            out = 0.5 if gated else 1.0  # size of y, that of x being 1
            # x in and y out; in training also dy and x in, dx out.
            for label, build, moved in (
                ("fwd", _forward, 1 + out),
                ("train", _training, 3 + 2 * out),
            ):
                kind = "swiglu" if gated else "gelu"
                size = (2048, 4096 if gated else 3072)
                name = f"{SHORT_NAMES[dtype]} bias+{kind} {label} {size[0]}x{size[1]}"
                made = functools.partial(build, dtype, *size, gated)
                count = moved * size[0] * size[1] * dtype.itemsize
                result.append(Row(name, 1.2, 2.0, dtype, made, bytes=count))
    return result
