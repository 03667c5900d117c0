"""torch's FlexAttention, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operations.attention import SOFTCAP, Attention
from ..problem import Prepared, leaves
from .compiled import compile_for_timing
from .peer import Peer


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return compile_for_timing(flex_attention, dynamic=None)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    # Not a closure: one function for all sizes is compiled once for all.
    return i >= j


def _mask(problem: Attention, tensors: dict[str, Tensor]) -> Any:
    """The block mask of what is seen, or None."""
    from torch.nn.attention.flex_attention import create_block_mask

    shift = problem.seqlen_k - problem.seqlen_q
    left = problem.window[0] if problem.window is not None else problem.seqlen_k
    padding, mask = tensors.get("key_padding_mask"), tensors.get("mask")

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + shift >= j) & (i + shift - j <= left)

    def padded(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert padding is not None
        return padding[b, j]

    def random(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        return mask[0, 0, i, j]

    functions = {"causal": causal, "window": causal, "padding": padded, "mask": random}
    if problem.seqlen_q == problem.seqlen_k:
        functions["causal"] = _causal
    if problem.variant not in functions:
        return None
    batch = problem.batch if problem.variant == "padding" else None
    return create_block_mask(
        functions[problem.variant], batch, None, problem.seqlen_q, problem.seqlen_k,
        device=problem.device,
    )  # fmt: skip


def _score(problem: Attention, tensors: dict[str, Tensor]) -> Any:
    """What is done to a score, or None."""
    bias, slopes = tensors.get("bias"), tensors.get("alibi_slopes")
    shift = problem.seqlen_k - problem.seqlen_q

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[0, h, i, j]

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[h] * (i + shift - j).abs()

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    return {"bias": biased, "alibi": alibi, "softcap": capped}.get(problem.variant)


def _attention(problem: Attention, tensors: dict[str, Tensor]) -> Prepared:
    q, k, v = (tensors[name] for name in "qkv")
    run = functools.partial(
        _compiled(), q, k, v, score_mod=_score(problem, tensors),
        block_mask=_mask(problem, tensors), enable_gqa=problem.heads != problem.heads_kv,
    )  # fmt: skip
    return Prepared(run, leaves(problem, tensors))


def _limits(problem: Attention) -> list[str]:
    if problem.device == "cpu" and problem.wants_gradient:
        return ["has no backward on the CPU"]
    return []


PEERS = (Peer("flex", {"attention": _attention}, limits=_limits, compiles=True),)
