"""Modules with the signatures of peers that cannot be installed here, in plain PyTorch.

The signatures are those of flash-attn 2.8, its Hopper and CuTe packages, xFormers 0.0.35,
Liger-Kernel 0.8 and QuACK 0.6: a peer's file that passes a wrong argument fails here.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all of them where `import` finds them, for one test."""
    modules = {
        "flash_attn": _module(flash_attn_func=_flash_2, flash_attn_varlen_func=_flash_2_varlen),
        "flash_attn.cute": _module(flash_attn_func=_flash_4, flash_attn_varlen_func=_varlen_4),
        "flash_attn_interface": _module(
            flash_attn_func=_flash_3, flash_attn_varlen_func=_flash_3_varlen
        ),
        "xformers": _module(),
        "xformers.ops": _module(memory_efficient_attention=_memory_efficient),
        "xformers.ops.fmha": _module(),
        "xformers.ops.fmha.attn_bias": _module(
            LowerTriangularFromBottomRightMask=_LowerTriangular,
            BlockDiagonalMask=_BlockDiagonal,
            BlockDiagonalCausalMask=_BlockDiagonalCausal,
        ),
        "liger_kernel": _module(),
        "liger_kernel.transformers": _module(),
        "liger_kernel.transformers.functional": _module(
            liger_fused_add_rms_norm=_liger_add_rms, liger_layer_norm=_liger_layer,
            liger_swiglu=lambda a, b: F.silu(a) * b,
        ),
        "quack": _module(rmsnorm=_quack_rms),
        "quack.rmsnorm": _module(layernorm_fwd=_quack_layer),
    }  # fmt: skip
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)


def _module(**names: Any) -> ModuleType:
    module = ModuleType("stand_in")
    vars(module).update(names)
    return module


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool,
    window: tuple[int, int] = (-1, -1), softcap: float = 0.0, slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, L, H, D), lower-right causal, by the words of flash_attn_func."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = (
        torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    )
    if slopes is not None:
        assert slopes.dtype == torch.float32
        scores = scores - slopes[:, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= (distance <= left) if left >= 0 else seen
    seen &= (-distance <= right) if right >= 0 else seen
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float | None,
    causal: bool,
) -> Tensor:  # fmt: skip
    assert starts.dtype == ends.dtype == torch.int32
    bounds = starts.tolist()
    parts = [
        _attention(q[None, a:b], k[None, a:b], v[None, a:b], scale, causal)[0]
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts)


def _flash_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return _attention(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def _flash_2_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def _flash_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    return _attention(q, k, v, softmax_scale, causal, window_size, softcap)


def _flash_3_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def _flash_4(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, **others,
):  # fmt: skip
    window = tuple(-1 if side is None else side for side in window_size)
    return _attention(q, k, v, softmax_scale, causal, window, softcap), None


def _varlen_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False, **others,
):  # fmt: skip
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None


class _LowerTriangular:
    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def make_local_attention(self, window_size: int) -> _LowerTriangular:
        return _LowerTriangular(window_size)


class _BlockDiagonal:
    causal = False

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls(list(q_seqlen))


class _BlockDiagonalCausal(_BlockDiagonal):
    causal = True


def _memory_efficient(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    if isinstance(attn_bias, _BlockDiagonal):
        parts = [x.split(attn_bias.lengths, dim=1) for x in (query, key, value)]
        outs = [_attention(*part, scale, attn_bias.causal) for part in zip(*parts, strict=True)]
        return torch.cat(outs, dim=1)
    if isinstance(attn_bias, _LowerTriangular):
        # Its window counts the query's own position.
        left = -1 if attn_bias.window is None else attn_bias.window - 1
        return _attention(query, key, value, scale, True, (left, -1))
    if attn_bias is None:
        return _attention(query, key, value, scale, False)
    assert attn_bias.shape[:2] == (query.shape[0], query.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + attn_bias
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _liger_add_rms(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    h = X + R
    return F.rms_norm(h, W.shape, W + offset, eps), h


def _liger_layer(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def _quack_rms(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6,
    prenorm=False, weight_offset=0.0,
):  # fmt: skip
    h = x + residual
    y = F.rms_norm(h, weight.shape, weight, eps)
    return (y, h) if prenorm else y


def _quack_layer(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert weight.dtype == torch.float32
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)
