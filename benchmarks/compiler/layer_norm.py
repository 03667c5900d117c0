"""Calls that between them launch every shipped configuration of the norm kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_attn.ops.layer_norm.problem import Operands, make_options
from fused_attn.ops.layer_norm.triton import launch

_WIDTHS = (64, 1024, 4096, 8192, 16384)
_SAMPLE: dict[int | str, tuple[int, ...]] = {80: (1024, 8192), 90: (64, 1024, 8192, 16384)}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def calls(arch: int | str, everything: bool) -> dict[str, Callable[[], None]]:
    """Name -> a function that launches forward and backward; on "meta" tensors."""
    kinds = ("plain", "residual dropout", "sum returned", "rms")[: None if everything else 2]
    dtypes = ("bf16", "fp32") if everything else ("bf16",)
    widths = _WIDTHS if everything else _SAMPLE.get(arch, (1024,))
    return {
        f"layer norm {dtype} {width} {kind}": functools.partial(_run, _DTYPES[dtype], width, kind)
        for dtype in dtypes
        for width in widths
        for kind in kinds
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run(dtype: torch.dtype, width: int, kind: str) -> None:
    rows = 4096
    x, weight = _meta(rows, width, dtype=dtype), _meta(width, dtype=dtype)
    residual = rng = h = None
    if kind in ("residual dropout", "sum returned"):
        residual, rng = torch.empty_like(x), _meta(2, dtype=torch.int64)
    if kind == "sum returned":
        h = torch.empty_like(x)
    rms = kind == "rms"
    operands = Operands(x, residual, weight, None if rms else weight, rng)
    options = make_options(
        dims=1, dtype=x.dtype, eps=1e-5, rms=rms, dropout_p=0.1 if rng is not None else 0.0
    )
    mean, rstd = None if rms else _meta(rows), _meta(rows)
    launch.forward(operands, options, torch.empty_like(x), h, mean, rstd)
    grads = (torch.empty_like(x), residual, weight, operands.bias)
    launch.backward(operands, options, h is not None, mean, rstd, x, h, grads)
