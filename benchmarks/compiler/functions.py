"""Calls of `flex_attention` that between them launch every kernel with functions of pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_attn.flex import api, compiled
from fused_attn.flex.expression import MASK_INPUTS, SCORE_INPUTS
from fused_attn.ops.attention.triton import backend, launch

_LENGTH, _BATCH, _HEADS = 2048, 2, 8
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("relative", "temperature", "table", "capped", "dilated", "neighbours", "listed", "few")


def calls(arch: int | str, everything: bool) -> dict[str, Callable[[], None]]:
    """Name -> a function that launches forward and backward; on "meta" tensors.

    Args:
        everything: all on each architecture; otherwise bfloat16 and head size 128 on sm_80 and
            sm_90.
    """
    sizes = [(dtype, size) for dtype in _DTYPES for size in (64, 128, 256)]
    if not everything:
        sizes = [("bf16", 128)] if arch in (80, 90) else []
    return {
        f"flex {dtype} {size} {kind}": functools.partial(_run, _DTYPES[dtype], size, kind)
        for dtype, size in sizes
        for kind in KINDS
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _functions(kind: str) -> tuple[Any, Any]:
    """A change of scores and a mask."""
    relative, scales = _meta(2 * _LENGTH).requires_grad_(), _meta(_HEADS).requires_grad_()
    table = _meta(_LENGTH, _LENGTH).requires_grad_()
    return {
        "relative": (
            lambda s, b, h, q, kv: s + relative[q - kv + _LENGTH],
            lambda b, h, q, kv: q >= kv,
        ),
        "temperature": (lambda s, b, h, q, kv: s * scales[h], None),
        "table": (lambda s, b, h, q, kv: s + table[q, kv], None),
        "capped": (lambda s, b, h, q, kv: 20 * torch.tanh(s / 20) * s.abs(), None),
        "dilated": (None, lambda b, h, q, kv: (q >= kv) & ((q - kv) % 3 == 0)),
        "neighbours": (
            None,
            lambda b, h, q, kv: ((q // 32 - kv // 32).abs() <= 3) & ((q % 32 - kv % 32).abs() <= 3),
        ),
        "listed": (lambda s, b, h, q, kv: s + table[q, kv], lambda b, h, q, kv: (q * kv) % 7 != 3),
        "few": (lambda s, b, h, q, kv: s * s.abs(), None),
    }[kind]


def _run(dtype: torch.dtype, head_dim: int, kind: str) -> None:
    score_mod, mask_mod = _functions(kind)
    few = kind == "few"  # queries, which share a tile
    q = _meta(_BATCH, _HEADS, 1 if few else _LENGTH, head_dim, dtype=dtype)
    length, heads = (8 * _LENGTH, 2) if few else (_LENGTH, _HEADS)
    k = _meta(_BATCH, heads, length, head_dim, dtype=dtype)
    score = api._read(score_mod, SCORE_INPUTS, "score_mod", q)
    mask = api._read(mask_mod, MASK_INPUTS, "mask_mod", q)
    call = api._call(score, mask, mask_mod, head_dim**-0.5, q, k)
    plan = compiled._plan_of(backend, call, q, k, k, call.captured())
    plan.memory = {}  # so that every architecture looks at the mask
    if kind == "listed":
        blocks = _LENGTH // 128
        plan.kinds, plan.block = _meta(1, 1, blocks, blocks, dtype=torch.int32), (128, 128)
    out, lse = torch.empty_like(q), _meta(*q.shape[:3])
    launch.forward(plan.operands, plan.options, out, lse, plan.forward())
    if not few:
        functions, _ = plan.backward()
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(k), None)
        launch.backward(plan.operands, plan.options, out, lse, out, None, None, grads, functions)
