"""Calls that between them launch every shipped configuration of bias + activation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_attn.ops.bias_activation.problem import Operands, make_options
from fused_attn.ops.bias_activation.triton import launch
from fused_attn.runtime.activations import ACTIVATIONS

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def calls(arch: int | str, everything: bool) -> dict[str, Callable[[], None]]:
    """Name -> a function that launches forward and backward; on "meta" tensors."""
    names = ACTIVATIONS if everything or arch == 90 else ACTIVATIONS[1:2]
    dtypes, widths = (("bf16", "fp32"), (4096, 64)) if everything else (("bf16",), (4096,))
    return {
        f"bias activation {dtype} {name} {width} {kind}": functools.partial(
            _run, _DTYPES[dtype], name, width, kind
        )
        for dtype in dtypes
        for name in names
        for width in widths
        for kind in ("plain", "gated dropout")
    }


def _run(dtype: torch.dtype, activation: str, width: int, kind: str) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    gated = kind != "plain"
    x, y = meta(4096, width * (1 + gated)), meta(4096, width)
    operands = Operands(x, meta(x.shape[1]), meta(2, dtype=torch.int64) if gated else None)
    options = make_options(activation=activation, gated=gated, dropout_p=0.1 if gated else 0.0)
    launch.forward(operands, options, y)
    launch.backward(operands, options, y, torch.empty_like(x), meta(x.shape[1]))
