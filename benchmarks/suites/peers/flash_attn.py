"""FlashAttention 2, 3 and 4 by their public functions, (batch, length, heads, head size).

Version 2 is `flash_attn.flash_attn_func`, 3 (Hopper) the module `flash_attn_interface`, 4 (CuTe)
`flash_attn.cute`. Causal is aligned to the lower right in all of them, as in our problems.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..operations.attention import SOFTCAP, Attention
from ..operations.packed import Packed
from ..problem import Prepared, leaves
from .peer import Peer, import_error, needs_gpu

MODULES = {
    "flash-attn-2": ("flash_attn", "flash-attn"),
    "flash-attn-3": ("flash_attn_interface", "flash-attn-3"),
    "flash-attn-4": ("flash_attn.cute", "flash-attn-4"),
}
LARGEST_HEAD = 256


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def heads_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as new leaves (B, L, H, D), contiguous."""
    return {
        name: tensors[name].detach().transpose(1, 2).contiguous()
        .requires_grad_(tensors[name].requires_grad)
        for name in "qkv"
    }  # fmt: skip


def _output(result: Any) -> Tensor:
    """Versions 3 and 4 return (out, lse) in some releases."""
    return result[0] if isinstance(result, tuple) else result


def _attention(name: str, problem: Attention, tensors: dict[str, Tensor]) -> Prepared:
    function = importlib.import_module(MODULES[name][0]).flash_attn_func
    arguments: dict[str, Any] = {"causal": problem.causal}
    if problem.window is not None:
        arguments["window_size"] = problem.window
    if problem.variant == "softcap":
        arguments["softcap"] = SOFTCAP
    if problem.variant == "alibi":
        arguments["alibi_slopes"] = tensors["alibi_slopes"].float()
    qkv = heads_last(tensors)
    return Prepared(
        lambda: _output(function(*qkv.values(), **arguments)),
        leaves(problem, qkv),
        arrange=lambda dout: dout.transpose(1, 2).contiguous(),
        restore=lambda name, x: _transposed(x),
    )


def _packed(name: str, problem: Packed, tensors: dict[str, Tensor]) -> Prepared:
    function = importlib.import_module(MODULES[name][0]).flash_attn_varlen_func
    q, k, v, starts = (tensors[name] for name in ("q", "k", "v", "cu_seqlens"))
    run = functools.partial(
        function, q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts,
        max_seqlen_q=problem.seqlen, max_seqlen_k=problem.seqlen,
        causal=problem.variant == "causal",
    )  # fmt: skip
    return Prepared(lambda: _output(run()), leaves(problem, tensors))


def _limits(name: str, problem: Attention | Packed) -> list[str]:
    reasons = needs_gpu(problem)
    if problem.dtype == torch.float32:
        reasons.append("has no kernels for float32")
    if problem.head_dim > LARGEST_HEAD:
        reasons.append(f"head sizes up to {LARGEST_HEAD}")
    if problem.variant in ("padding", "mask", "bias"):
        reasons.append("takes no mask and no bias")
    if problem.variant == "alibi" and name != "flash-attn-2":
        reasons.append("has no ALiBi")
    if problem.variant == "softcap" and name == "flash-attn-4" and problem.wants_gradient:
        reasons.append("has no softcap in the backward")
    return reasons


PEERS = tuple(
    Peer(
        name,
        {
            "attention": functools.partial(_attention, name),
            "packed": functools.partial(_packed, name),
        },
        missing=functools.partial(import_error, *module),
        limits=functools.partial(_limits, name),
        package=module[0],
    )
    for name, module in MODULES.items()
)
