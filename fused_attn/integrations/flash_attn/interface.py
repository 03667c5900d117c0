"""The functions of `flash_attn.flash_attn_interface` (Dao 2023), run by our kernels.

Differences from `fused_attn.attention`, all of them flash_attn's: tensors are (B, L, H, D); causal
and windows are lower right (the last query sees the last key); -1 in a window, and 0 as softcap,
mean none. Beyond flash_attn: float32 and float64, the CPU, any GPU, any head size.

What a row without a visible key gets is ours: output 0 and lse -inf (flash_attn's lse is +inf).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import attention, attention_varlen
from ...runtime import checks, philox

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of dense batches.

    Args:
        q: (B, Lq, H, D). k: (B, Lk, Hkv, D). v: (B, Lk, Hkv, Dv). H a multiple of Hkv.
        dropout_p: applied whenever it is not 0.
        softmax_scale: 1/sqrt(D) if None.
        causal, window_size: the query at i sees the key at j iff, with d = i + Lk - Lq - j,
            d >= 0 (causal) and -right <= d <= left.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        alibi_slopes: (H,) or (B, H) float32; the score loses slope * abs(i + Lk - Lq - j).
        deterministic: nothing to do on a CPU, where our backward always is. On a GPU call
            `torch.use_deterministic_algorithms(True)`; True without it is refused.
        return_attn_probs: return lse and the probabilities as well, as flash_attn's tests use them.

    Returns:
        out (B, Lq, H, Dv); or (out, lse (B, H, Lq) float32, probabilities). The last is None
        without dropout; with it (B, H, Lq, Lk), negative where dropped.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.expect_rank(name, tensor, 4, "(B, L, heads, head size)")
    _check_deterministic(deterministic, q)
    shared: dict[str, Any] = {
        "causal": causal_of(causal),
        "window": window_of(window_size),
        "softcap": softcap,
        "scale": softmax_scale,
        "layout": "blhd",
        **alibi_of(alibi_slopes, q, k),
    }
    if not return_attn_probs:
        return attention(q, k, v, dropout_p=dropout_p, **shared)
    if not dropout_p:
        return (*attention(q, k, v, return_lse=True, **shared), None)
    rng = philox.rng_of_call(None, dropout_p, q, "q")
    dropped = {"dropout_p": dropout_p, "dropout_rng": rng}
    out, lse, kept = attention(
        q, k, v, return_lse=True, return_weights="per_head", **dropped, **shared
    )
    with torch.no_grad():
        _, weights = attention(q, k, v, return_weights="per_head", **shared)
        weights = torch.where(kept != 0, weights, -weights)
    return out, lse, weights


def flash_attn_qkvpacked_func(qkv: Tensor, *options: Any, **named: Any) -> Any:
    """`flash_attn_func(q, k, v, *options)` of qkv (B, L, 3, H, D); nothing is copied."""
    q, k, v = _unpacked("qkv", qkv, 5, "(B, L, 3, H, D)")
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *options: Any, **named: Any) -> Any:
    """`flash_attn_func(q, k, v, *options)` of kv (B, Lk, 2, Hkv, D); nothing is copied."""
    k, v = _unpacked("kv", kv, 5, "(B, Lk, 2, Hkv, D)")
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences; positions count from the start of each.

    Args:
        q: (Tq, H, D). k: (Tk, Hkv, D). v: (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) int32, cumulative lengths; sequences may be empty.
        max_seqlen_q, max_seqlen_k: at least the longest length.
        alibi_slopes: (H,) or (N, H) float32.
        block_table: (N, pages) int32: k and v are then pages (number of pages, page size, Hkv, D),
            and sequence n reads its keys from the pages `block_table[n]`, in that order.
        The others as in `flash_attn_func`.

    Returns:
        out (Tq, H, Dv); or (out, lse (H, Tq) float32, None).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the probabilities under dropout are asked for.
    """
    if return_attn_probs and dropout_p:
        raise NotImplementedError(
            "`return_attn_probs` with `dropout_p` gives no probabilities of packed sequences; "
            "use flash_attn_func for each"
        )
    _check_deterministic(deterministic, q)
    if block_table is not None:
        from .paged import packed_pages

        k, v, cu_seqlens_k = packed_pages(k, v, block_table, cu_seqlens_k)
    options: dict[str, Any] = {
        "causal": causal_of(causal),
        "window": window_of(window_size),
        "softcap": softcap,
        "scale": softmax_scale,
        "dropout_p": dropout_p,
        "return_lse": return_attn_probs,
    }
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        found = one_by_one(q, k, v, lengths, alibi_slopes, options)
    else:
        found = attention_varlen(q, k, v, *lengths, alibi_slopes=alibi_slopes, **options)
    return (*found, None) if return_attn_probs else found


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any, **named: Any
) -> Any:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D) and its options; nothing is copied."""
    q, k, v = _unpacked("qkv", qkv, 4, "(T, 3, H, D)")
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, *options, **named)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
    **named: Any,
) -> Any:
    """`flash_attn_varlen_func` of kv (Tk, 2, Hkv, D) and its options; nothing is copied."""
    k, v = _unpacked("kv", kv, 4, "(Tk, 2, Hkv, D)")
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(q, k, v, *lengths, *options, **named)


def _unpacked(name: str, packed: Tensor, rank: int, shape: str) -> tuple[Tensor, ...]:
    checks.expect_rank(name, packed, rank, shape)
    number = len(name)  # "qkv" holds three, "kv" two
    if packed.shape[-3] != number:
        raise ValueError(f"`{name}` must be {shape}, got {tuple(packed.shape)}")
    return packed.unbind(-3)


def causal_of(causal: bool) -> Any:
    return "lower_right" if causal else False


def window_of(window_size: tuple[int, int] | None) -> tuple[int, int] | None:
    if window_size is None:
        return None
    if len(window_size) != 2:
        raise ValueError(f"`window_size` must be (left, right), got {window_size!r}")
    left, right = (-1 if size is None or size < 0 else int(size) for size in window_size)
    return None if left == right == -1 else (left, right)


def alibi_of(slopes: Tensor | None, q: Tensor, k: Tensor) -> dict[str, Any]:
    """ALiBi's operand: the slopes, or where each batch element has its own a bias."""
    if slopes is None:
        return {}
    checks.expect_tensor("alibi_slopes", slopes)
    if slopes.dim() < 2:
        return {"alibi_slopes": slopes}
    batch, seqlen_q, num_heads = q.shape[:3]
    checks.expect_shape("alibi_slopes", slopes, (batch, num_heads), "(B, H)")
    seqlen_k = k.shape[1]
    i = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
    distance = (i - torch.arange(seqlen_k, device=q.device)).abs()
    return {"bias": -slopes.float()[:, :, None, None] * distance}


def one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    slopes: Tensor,
    options: dict[str, Any],
) -> Any:
    """Packed sequences whose slopes differ: one call for each, put together."""
    cu_q, cu_k = lengths[0].tolist(), lengths[1].tolist()
    checks.expect_shape("alibi_slopes", slopes, (len(cu_q) - 1, q.shape[1]), "(N, H)")
    whole: Any = []
    for n, own in enumerate(slopes):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        whole.append(
            attention_varlen(
                q[rows],
                k[keys],
                v[keys],
                lengths[0][n : n + 2] - cu_q[n],
                lengths[1][n : n + 2] - cu_k[n],
                cu_q[n + 1] - cu_q[n],
                cu_k[n + 1] - cu_k[n],
                alibi_slopes=own,
                **options,
            )
        )
    rest = q.shape[0] - cu_q[-1]  # rows past the last sequence
    if not options["return_lse"]:
        return torch.cat([*whole, q.new_zeros(rest, q.shape[1], v.shape[2])])
    outs, lses = zip(*whole, strict=True)
    lse = lses[0].new_full((q.shape[1], rest), -torch.inf)
    return torch.cat([*outs, q.new_zeros(rest, q.shape[1], v.shape[2])]), torch.cat(
        [*lses, lse], dim=1
    )


def _check_deterministic(deterministic: bool, q: Tensor) -> None:
    on_cpu = isinstance(q, Tensor) and q.device.type == "cpu"
    if deterministic and not on_cpu and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "`deterministic=True` needs torch.use_deterministic_algorithms(True) on "
            f"{getattr(q, 'device', 'this device')}: the setting is torch's here"
        )
