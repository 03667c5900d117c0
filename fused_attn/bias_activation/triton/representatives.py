"""Calls that between them launch every shipped configuration of bias + activation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import ACTIVATIONS, Operands, make_options
from . import launch


def calls(arch: int, everything: bool) -> dict[str, Callable[[], None]]:
    """Name -> a function that launches forward and backward; on "meta" tensors."""
    names = ACTIVATIONS if everything or arch == 90 else ACTIVATIONS[1:2]
    return {
        f"bias activation bf16 {name} {kind}": functools.partial(_run, name, kind)
        for name in names
        for kind in ("plain", "gated dropout")
    }


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run(activation: str, kind: str) -> None:
    gated = kind != "plain"
    x, y = _meta(4096, 4096 * (1 + gated)), _meta(4096, 4096)
    operands = Operands(x, _meta(x.shape[1]), _meta(2, dtype=torch.int64) if gated else None)
    options = make_options(activation=activation, gated=gated, dropout_p=0.1 if gated else 0.0)
    launch.forward(operands, options, y)
    launch.backward(operands, options, y, torch.empty_like(x), _meta(x.shape[1]))
