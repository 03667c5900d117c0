"""xFormers' memory_efficient_attention, by whichever of its kernels it chooses."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..operations.attention import Attention
from ..operations.packed import Packed
from ..problem import Prepared, leaves
from .flash_attn import heads_last
from .peer import Peer, import_error, needs_gpu

# The memory of a bias must be laid out in rows of a multiple of this many elements.
BIAS_ALIGNMENT = 8


def _ops() -> Any:
    return importlib.import_module("xformers.ops")


def _fmha() -> Any:
    return importlib.import_module("xformers.ops.fmha.attn_bias")


def _bias(problem: Attention, tensors: dict[str, Tensor]) -> Any:
    """Its `attn_bias`."""
    biases = _fmha()
    if problem.variant == "causal":
        return biases.LowerTriangularFromBottomRightMask()
    if problem.variant == "window" and problem.window is not None:
        # Its window counts the query's own position.
        size = problem.window[0] + 1
        return biases.LowerTriangularFromBottomRightMask().make_local_attention(size)
    if problem.variant == "bias":
        return tensors["bias"].expand(problem.batch, -1, -1, -1)
    return None


def _attention(problem: Attention, tensors: dict[str, Tensor]) -> Prepared:
    qkv, bias = heads_last(tensors), _bias(problem, tensors)
    inputs = {**qkv, "bias": tensors["bias"]} if problem.variant == "bias" else qkv
    run = functools.partial(_ops().memory_efficient_attention, *qkv.values(), attn_bias=bias)
    return Prepared(
        run,
        leaves(problem, inputs),
        arrange=lambda dout: dout.transpose(1, 2).contiguous(),
        restore=lambda name, x: x if name == "bias" else x.transpose(1, 2),
    )


def _packed(problem: Packed, tensors: dict[str, Tensor]) -> Prepared:
    biases = _fmha()
    kind = biases.BlockDiagonalMask
    if problem.variant == "causal":
        kind = biases.BlockDiagonalCausalMask
    bias = kind.from_seqlens(problem.lengths)
    inputs = {name: tensors[name] for name in "qkv"}
    run = functools.partial(
        _ops().memory_efficient_attention, *(x[None] for x in inputs.values()), attn_bias=bias
    )
    return Prepared(lambda: run()[0], leaves(problem, inputs))


def _limits(problem: Attention | Packed) -> list[str]:
    reasons = needs_gpu(problem)
    if problem.heads != problem.heads_kv:
        reasons.append("heads are grouped only by expanding keys and values")
    if problem.variant in ("padding", "mask", "alibi", "softcap"):
        reasons.append(f"has no {problem.variant}" if problem.variant in ("alibi", "softcap")
                       else "takes no bool mask")  # fmt: skip
    if problem.variant == "bias" and int(str(problem.columns()["seqlen_k"])) % BIAS_ALIGNMENT:
        reasons.append(f"a bias needs a multiple of {BIAS_ALIGNMENT} keys")
    if problem.dtype == torch.float32 and problem.wants_gradient and problem.head_dim > 128:
        reasons.append("float32 backward for head sizes up to 128")
    return reasons


PEERS = (
    Peer(
        "xformers",
        {"attention": _attention, "packed": _packed},
        missing=functools.partial(import_error, "xformers.ops", "xformers"),
        limits=_limits,
        package="xformers.ops",
    ),
)
