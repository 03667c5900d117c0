"""Pages of a cache, put together in the order of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import checks


def check_table(k: Tensor, v: Tensor, block_table: Tensor) -> None:
    """Raise where pages and table cannot be a cache (values only on the CPU)."""
    checks.expect_rank("k_cache", k, 4, "(pages, page size, Hkv, D)")
    checks.expect_shape("v_cache", v, (*k.shape[:3], v.shape[-1]), "(pages, page size, Hkv, Dv)")
    checks.expect_rank("block_table", block_table, 2, "(B, pages of a sequence)")
    checks.expect_dtype("block_table", block_table, (torch.int32, torch.int64))


def gather(cache: Tensor, table: Tensor) -> Tensor:
    """(B, pages * page size, Hkv, D) out of pages; a copy.

    Raises:
        ValueError: on the CPU, a page number is outside of the cache.
    """
    if table.device.type == "cpu" and table.numel():
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= cache.shape[0]:
            raise ValueError(
                f"`block_table` must hold page numbers in [0, {cache.shape[0]}), "
                f"got {low if low < 0 else high}"
            )
    else:  # a wrong number stays inside the cache; who looks would have to wait for the device
        table = table.clamp(0, max(cache.shape[0] - 1, 0))
    return cache[table.long()].flatten(1, 2)


def packed_pages(
    k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of all sequences one after the other, and their cumulative lengths."""
    check_table(k, v, block_table)
    batch, pages = block_table.shape
    checks.expect_shape("cu_seqlens_k", cu_seqlens_k, (batch + 1,), "(N + 1,), N rows of the table")
    lengths = cu_seqlens_k.diff()
    room = pages * k.shape[1]
    if lengths.device.type == "cpu" and batch and int(lengths.max()) > room:
        raise ValueError(
            f"`block_table` has room for {room} keys a sequence, got {int(lengths.max())}"
        )
    used = pages
    if lengths.device.type == "cpu" and batch:
        used = -(-int(lengths.max()) // k.shape[1])
    rows = torch.arange(used * k.shape[1], device=k.device)
    kept = rows < lengths[:, None]
    # Numbers of pages that a sequence does not reach may be anything.
    table = torch.where(kept[:, :: k.shape[1]], block_table[:, :used], 0)
    return gather(k, table)[kept], gather(v, table)[kept], cu_seqlens_k
