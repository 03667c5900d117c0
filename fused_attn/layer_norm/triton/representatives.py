"""Calls that between them launch every shipped configuration of the norm kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Operands, make_options
from . import launch

_WIDTHS = (64, 1024, 8192, 16384)


def calls(arch: int, everything: bool) -> dict[str, Callable[[], None]]:
    """Name -> a function that launches forward and backward; on "meta" tensors."""
    widths = _WIDTHS if everything or arch == 90 else (1024,)
    result: dict[str, Callable[[], None]] = {}
    for width in widths:
        for kind in ("plain", "residual dropout"):
            result[f"layer norm bf16 {width} {kind}"] = functools.partial(_run, width, kind)
    return result


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run(width: int, kind: str) -> None:
    rows = 4096
    x = _meta(rows, width, dtype=torch.bfloat16)
    residual = rng = None
    if kind != "plain":
        residual, rng = torch.empty_like(x), _meta(2, dtype=torch.int64)
    weight = _meta(width, dtype=torch.bfloat16)
    operands = Operands(x, residual, weight, weight, rng)
    options = make_options(
        dims=1, dtype=x.dtype, eps=1e-5, rms=False, dropout_p=0.1 if rng is not None else 0.0
    )
    mean, rstd = _meta(rows), _meta(rows)
    launch.forward(operands, options, torch.empty_like(x), None, mean, rstd)
    grads = (torch.empty_like(x), residual, weight, weight)
    launch.backward(operands, options, False, mean, rstd, x, None, grads)
