"""The operands of a call with functions: its tensors, and what is known of its mask."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..ops.attention.arguments import documents
from ..ops.attention.problem import AttentionProblem, Operands, Options, make_options
from . import known
from .call import Call
from .expression import Node


def problem_of(q: Any, k: Any = None, v: Any = None) -> AttentionProblem:
    """A call without its functions, as far as backends have to know of it."""
    shapes = (q.shape, (q if k is None else k).shape, (q if v is None else v).shape)
    return _problem(shapes, q.dtype, q.device)


@functools.lru_cache(maxsize=256)
def _problem(
    shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
) -> AttentionProblem:
    (batch, num_heads, seqlen_q, head_dim), (_, num_heads_kv, seqlen_k, _), of_v = shapes
    return AttentionProblem(
        device=device,
        dtype=dtype,
        batch=batch,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=of_v[3],
        options=make_options(max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k, head_dim=head_dim),
    )


def known_parts(call: Call, q: Tensor, k: Tensor) -> tuple[dict[str, Any], list[Node] | None]:
    """Arguments of `attention` for known parts of the mask, and the others; None: all of it.

    Where blocks are listed, the lists decide, and what they show the operands could hide.
    """
    if call.mask is None or hasattr(call.block_mask, "kv_num_blocks"):
        return {}, None
    found, rest = known.parts_of(call.mask)
    named = found.operands(q, k)
    return ({}, None) if named is None else (named, rest)


def made(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    named: dict[str, Any],
) -> tuple[Operands, Options]:
    ids: Any = (None, None)
    if "document_ids" in named:
        ids = documents(named["document_ids"], q, k)
    operands = Operands(
        q.detach(),
        k.detach(),
        v.detach(),
        mask=seen,
        key_lengths=named.get("key_lengths"),
        query_documents=ids[0],
        key_documents=ids[1],
        prefix_lengths=named.get("prefix_lengths"),
    )
    options = make_options(
        max_seqlen_q=q.shape[2],
        max_seqlen_k=k.shape[2],
        head_dim=q.shape[3],
        scale=scale,
        causal=named.get("causal", False),
        window=named.get("window"),
        chunk=named.get("chunk"),
    )
    return operands, options
