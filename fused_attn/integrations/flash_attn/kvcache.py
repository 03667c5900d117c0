"""`flash_attn_with_kvcache`: append new keys and values to a cache in place, and attend to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import attention, attention_varlen
from ...runtime import checks, overlap
from . import paged
from .interface import alibi_of, causal_of, one_by_one, window_of
from .rotary import rotate

__all__ = ["flash_attn_with_kvcache"]


class _Cache(NamedTuple):
    """A cache as the call found it: dense, or pages that a table puts in order."""

    k: Tensor  # (batch of the cache, S, Hkv, D), or (pages, page size, Hkv, D)
    v: Tensor
    block_table: Tensor | None  # (B, pages of a sequence)
    batch_idx: Tensor | None  # (B,), rows of a dense cache

    @property
    def room(self) -> int:
        """Keys that one sequence can hold."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new queries to a cache, after new keys and values were written into it.

    Sequence b has n = cache_seqlens[b] keys. New ones (k, v) are written at n, n + 1, ... in place,
    and then count: the last query sees the last key. No gradient.

    Args:
        q: (B, Lq, H, D).
        k_cache, v_cache: (B or more, S, Hkv, D) and (..., Dv), or with a block_table pages
            (number of pages, page size, Hkv, D); any page size.
        k, v: (B, Lnew, Hkv, D) and (B, Lnew, Hkv, Dv), or None: nothing is written.
        rotary_cos, rotary_sin: (positions, R / 2): new keys are turned at n, n + 1, ..., queries
            likewise where causal or a window is given, else all at n. Needs k.
        cache_seqlens: a number or (B,) int32; the whole cache if None, which needs k to be None.
        cache_batch_idx: (B,) int, the row of the cache that each sequence has; its own if None.
        cache_leftpad: (B,) int, the first key of each sequence; before it nothing is seen.
        block_table: (B, pages of a sequence) int32.
        causal, window_size, softmax_scale, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: turn neighbours (GPT-J) in place of halves (GPT-NeoX).
        num_splits: taken, and decided by the kernels themselves.
        return_softmax_lse: return lse (B, H, Lq) float32 as well.

    Returns:
        out (B, Lq, H, Dv), or (out, lse).

    Raises:
        TypeError, ValueError: an argument is wrong or, on the CPU, a length, row or page is
            outside of the cache; nothing is written then. On a GPU, where a look would cost a
            wait, torch's own indexing says so when it writes.
    """
    cache = _Cache(k_cache, v_cache, block_table, cache_batch_idx)
    _check(q, cache, k, v, cache_leftpad)
    lengths = _lengths(q, cache, k, cache_seqlens)
    options: dict[str, Any] = {
        "causal": causal_of(causal),
        "window": window_of(window_size),
        "softcap": softcap,
        "scale": softmax_scale,
        "return_lse": return_softmax_lse,
    }
    if rotary_cos is not None or rotary_sin is not None:
        ordered = causal or options["window"] is not None
        q, k = _turned(q, k, rotary_cos, rotary_sin, lengths, rotary_interleaved, ordered)
    if k is not None:
        assert v is not None
        _expect_writable(cache, _Others(q, k, v))
        _append(cache, k, v, lengths)
        lengths = lengths + k.shape[1]
    if _are_alike(lengths) and cache_leftpad is None:
        return _attend_alike(q, cache, lengths, alibi_slopes, options)
    return _attend(q, cache, lengths, cache_leftpad, alibi_slopes, options)


def _check(
    q: Tensor, cache: _Cache, k: Tensor | None, v: Tensor | None, leftpad: Tensor | None
) -> None:
    checks.expect_rank("q", q, 4, "(B, Lq, H, D)")
    batch = q.shape[0]
    if cache.block_table is not None:
        paged.check_table(cache.k, cache.v, cache.block_table)
        checks.expect_shape(
            "block_table", cache.block_table, (batch, cache.block_table.shape[1]), "(B, pages)"
        )
        if cache.batch_idx is not None:
            raise ValueError("`cache_batch_idx` must be None where a `block_table` is given")
    checks.expect_rank("k_cache", cache.k, 4, "(B, S, Hkv, D)")
    rows, room, heads, size = cache.k.shape
    checks.expect_rank("v_cache", cache.v, 4, "(B, S, Hkv, Dv)")
    checks.expect_shape("v_cache", cache.v, (rows, room, heads, cache.v.shape[3]), "as `k_cache`")
    if cache.block_table is None and cache.batch_idx is None and rows < batch:
        raise ValueError(f"`k_cache` must hold at least {batch} sequences, as `q` does, got {rows}")
    for name, vector in (("cache_batch_idx", cache.batch_idx), ("cache_leftpad", leftpad)):
        if vector is not None:
            checks.expect_shape(name, vector, (batch,), "(B,)")
            checks.expect_dtype(name, vector, (torch.int32, torch.int64))
    _check_inside("cache_batch_idx", cache.batch_idx, rows - 1)
    _check_inside("cache_leftpad", leftpad, room)
    if (k is None) != (v is None):
        raise ValueError("`k` and `v` must be given together")
    if k is not None and v is not None:
        new = k.shape[1] if k.dim() > 1 else 0
        checks.expect_shape("k", k, (batch, new, heads, size), "(B, Lnew, Hkv, D)")
        checks.expect_shape("v", v, (batch, new, heads, cache.v.shape[3]), "(B, Lnew, Hkv, Dv)")
        checks.expect_dtype("k", k, (cache.k.dtype,))
        checks.expect_dtype("v", v, (cache.v.dtype,))


def _check_inside(name: str, values: Tensor | None, most: int) -> None:
    if values is None or values.device.type != "cpu" or not values.numel():
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > most:
        raise ValueError(f"`{name}` must be in [0, {most}], got {low if low < 0 else high}")


def _lengths(
    q: Tensor, cache: _Cache, k: Tensor | None, cache_seqlens: int | Tensor | None
) -> Tensor:
    """(B,) int64: the keys that each sequence has before new ones are written."""
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("`cache_seqlens` must say where `k` is written, got None")
        cache_seqlens = cache.room
    if not isinstance(cache_seqlens, Tensor):
        number = checks.expect_integer("cache_seqlens", cache_seqlens, 0)
        cache_seqlens = torch.full((q.shape[0],), number, device=q.device)
    checks.expect_shape("cache_seqlens", cache_seqlens, (q.shape[0],), "(B,)")
    checks.expect_dtype("cache_seqlens", cache_seqlens, (torch.int32, torch.int64))
    new = 0 if k is None else k.shape[1]
    if new > cache.room:
        raise ValueError(f"`k` has {new} new keys, the cache has room for {cache.room}")
    _check_inside("cache_seqlens", cache_seqlens, cache.room - new)
    return cache_seqlens.long()


def _turned(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    interleaved: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor]:
    """q and k with rotary positions; without an order every query stands at the first new place."""
    if cos is None or sin is None:
        raise ValueError("`rotary_cos` and `rotary_sin` must be given together")
    if k is None:
        raise ValueError("`rotary_cos` needs the new keys `k`: those in the cache are turned")
    checks.expect_shape("rotary_sin", sin, tuple(cos.shape), "that of `rotary_cos`")
    first = lengths[:, None]
    new, rows = (torch.arange(x.shape[1], device=q.device) for x in (k, q))
    k = rotate(k, cos, sin, first + new, interleaved)
    return rotate(q, cos, sin, first + (rows if ordered else 0 * rows), interleaved), k


class _Others(NamedTuple):
    """What a cache that is written must share no memory with."""

    q: Tensor
    k: Tensor
    v: Tensor


def _expect_writable(cache: _Cache, others: _Others) -> None:
    for name, store in (("k_cache", cache.k), ("v_cache", cache.v)):
        overlap.expect_writable(name, store)
        overlap.expect_apart(name, store, others)
    if overlap.share_memory(cache.k, cache.v):
        raise ValueError("`k_cache` and `v_cache` must not share memory where `k` is written")


def _append(cache: _Cache, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    places = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
    rows: Tensor
    if cache.block_table is not None:
        size = cache.k.shape[1]
        rows = cache.block_table.long().gather(1, places // size)
        places = places % size
        _check_inside("block_table", rows, cache.k.shape[0] - 1)
        flat = rows * size + places
        if flat.device.type == "cpu" and flat.unique().numel() < flat.numel():
            raise ValueError("`block_table` must give each new key a place of its own")
    else:
        own = torch.arange(k.shape[0], device=k.device)
        rows = (own if cache.batch_idx is None else cache.batch_idx.long())[:, None]
    cache.k[rows, places] = k
    cache.v[rows, places] = v


def _are_alike(lengths: Tensor) -> bool:
    """True where all sequences are known to have the same number of keys."""
    on_cpu = lengths.device.type == "cpu"
    return on_cpu and lengths.numel() > 0 and bool((lengths == lengths[0]).all())


def _in_order(cache: _Cache, lengths: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """The first `used` keys and values, or more, of each sequence: (B, S, Hkv, D)."""
    if cache.block_table is not None:
        size = cache.k.shape[1]
        table = cache.block_table[:, : -(-used // size)]
        # Numbers of pages that a sequence does not reach may be anything.
        first = torch.arange(table.shape[1], device=table.device) * size
        table = torch.where(first < lengths[:, None], table, 0)
        return paged.gather(cache.k, table), paged.gather(cache.v, table)
    if cache.batch_idx is not None:
        rows = cache.batch_idx.long()
        return cache.k[rows, :used], cache.v[rows, :used]
    return cache.k[: len(lengths)], cache.v[: len(lengths)]


def _attend_alike(
    q: Tensor, cache: _Cache, lengths: Tensor, slopes: Tensor | None, options: dict[str, Any]
) -> Any:
    """All sequences have the same length: a dense call reads the cache in place."""
    length = int(lengths[0])
    keys, values = (x[:, :length] for x in _in_order(cache, lengths, length))
    return attention(q, keys, values, layout="blhd", **options, **alibi_of(slopes, q, keys))


def _attend(
    q: Tensor,
    cache: _Cache,
    lengths: Tensor,
    leftpad: Tensor | None,
    slopes: Tensor | None,
    options: dict[str, Any],
) -> Any:
    """The cache as packed sequences, in place: what is not seen are sequences without queries."""
    batch, seqlen_q, num_heads, _ = q.shape
    used = int(lengths.max()) if lengths.device.type == "cpu" and batch else cache.room
    keys, values = _in_order(cache, lengths, used)
    room = keys.shape[1]
    ends = [lengths, torch.full_like(lengths, room)]
    if leftpad is not None:
        ends.insert(0, torch.minimum(leftpad.long(), lengths))
    start = torch.arange(batch, device=q.device) * room
    cu_k = _cumulative(torch.stack(ends, dim=1) + start[:, None])
    parts = len(ends)
    rows = torch.zeros(batch, parts, dtype=torch.int64, device=q.device)
    rows[:, -2] = seqlen_q  # the part that is seen
    cu_q = _cumulative(rows.flatten().cumsum(0))
    packed = (q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
    sizes: Any = (cu_q, cu_k, seqlen_q, room)
    if slopes is not None and slopes.dim() == 2:
        checks.expect_shape("alibi_slopes", slopes, (batch, num_heads), "(B, H)")
        own = slopes.repeat_interleave(parts, dim=0)
        found = one_by_one(*packed, sizes, own, {**options, "dropout_p": 0.0})
    else:
        found = attention_varlen(*packed, *sizes, alibi_slopes=slopes, **options)
    if not options["return_lse"]:
        return found.unflatten(0, (batch, seqlen_q))
    out, lse = found
    lse = lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1)
    return out.unflatten(0, (batch, seqlen_q)), lse.contiguous()


def _cumulative(ends: Tensor) -> Tensor:
    return torch.nn.functional.pad(ends.flatten(), (1, 0)).to(torch.int32)
