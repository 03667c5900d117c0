"""A cache in pages: rows that share a beginning share its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import checks


class PagedKeyValueCache:
    """Keys and values of one self-attention in pages of equal size (Kwon et al. 2023, "vLLM").

    Each row of the batch has a list of pages. Memory grows page by page, and `reorder` copies no
    keys but lists: rows that come from one row share its pages until one of them writes, and then
    only the page that is written is copied. That suits beam search over long texts. Each call puts
    the pages of all rows together for the kernels, a copy that `KeyValueCache` does not need.

    Args:
        page_size: positions in a page.
        max_len: positions that fit; None: any number.

    Attributes:
        pages_k, pages_v: (pages, page size, H, D); `block_table`: (N, pages of a row) int64. So
            `flash_attn_with_kvcache` reads them as they are.
        length: positions that are stored.

    Raises:
        TypeError, ValueError: a size is no integer above 0.
    """

    def __init__(self, page_size: int = 64, max_len: int | None = None) -> None:
        self.page_size = checks.expect_integer("page_size", page_size, 1)
        self.max_len = None if max_len is None else checks.expect_integer("max_len", max_len, 1)
        self.length = 0
        self.pages_k: Tensor | None = None
        self.pages_v: Tensor | None = None
        self.block_table = torch.empty(0, 0, dtype=torch.int64)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Cache`.

        Raises:
            ValueError: they do not fit, are of another batch, dtype or device than before, or want
                a gradient, which cannot reach what was written in place.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "a PagedKeyValueCache keeps no gradients; call within torch.no_grad(), "
                "or use KeyValueCache"
            )
        end = self.length + k.shape[2]
        if self.max_len is not None and end > self.max_len:
            raise ValueError(f"`cache` holds max_len={self.max_len} positions, got {end}")
        self._expect_like(k)
        self._make_pages(end, k, v)
        assert self.pages_k is not None
        assert self.pages_v is not None
        places = torch.arange(self.length, end, device=k.device)
        pages, rows = self.block_table[:, places // self.page_size], places % self.page_size
        self.pages_k[pages, rows] = k.transpose(1, 2)
        self.pages_v[pages, rows] = v.transpose(1, 2)
        self.length = end
        return self._all(self.pages_k), self._all(self.pages_v)

    def reorder(self, rows: Tensor) -> None:
        """As of `Cache`; no key is copied."""
        if self.pages_k is not None:
            self.block_table = self.block_table.index_select(0, rows)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on.

        Raises:
            ValueError: fewer are stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"`length` must be in [0, {self.length}], got {length}")
        self.length = length
        self.block_table = self.block_table[:, : -(-length // self.page_size)]

    def _all(self, pages: Tensor) -> Tensor:
        """(N, H, length, D) of what is stored."""
        return pages[self.block_table].flatten(1, 2)[:, : self.length].transpose(1, 2)

    def _expect_like(self, k: Tensor) -> None:
        if self.pages_k is None:
            self.block_table = torch.empty(k.shape[0], 0, dtype=torch.int64, device=k.device)
            return
        stored = self.pages_k
        mine = (self.block_table.shape[0], *stored.shape[2:], stored.dtype, stored.device)
        theirs = (k.shape[0], k.shape[1], k.shape[3], k.dtype, k.device)
        if mine != theirs:
            raise ValueError(
                f"`cache` holds (batch, heads, head size, dtype, device) "
                f"({', '.join(map(str, mine))}), got ({', '.join(map(str, theirs))})"
            )

    def _make_pages(self, end: int, k: Tensor, v: Tensor) -> None:
        """Pages up to `end` that each row may write to: shared ones are copied first."""
        if self.pages_k is None:
            self.pages_k, self.pages_v = (
                x.new_empty(0, self.page_size, x.shape[1], x.shape[3]) for x in (k, v)
            )
        if self.length % self.page_size and end > self.length:
            self._own(self.length // self.page_size)
        batch, pages = self.block_table.shape
        missing = -(-end // self.page_size) - pages
        if missing > 0:
            new = self._take(batch * missing).view(batch, missing)
            self.block_table = torch.cat([self.block_table, new], dim=1)

    def _own(self, column: int) -> None:
        """Give each row a page for itself alone in this column of the table."""
        seen: set[int] = set()
        shared = []
        for row, page in enumerate(self.block_table[:, column].tolist()):
            if page in seen:
                shared.append(row)
            seen.add(page)
        if not shared:
            return
        old, new = self.block_table[shared, column], self._take(len(shared))
        assert self.pages_k is not None
        assert self.pages_v is not None
        self.pages_k[new], self.pages_v[new] = self.pages_k[old], self.pages_v[old]
        self.block_table = self.block_table.clone()
        self.block_table[shared, column] = new

    def _take(self, number: int) -> Tensor:
        """Numbers of pages that no row has, (number,); memory doubles where there are too few."""
        assert self.pages_k is not None
        assert self.pages_v is not None
        room = self.pages_k.shape[0]
        used = torch.zeros(room, dtype=torch.bool, device=self.block_table.device)
        used[self.block_table.flatten()] = True
        free = (~used).nonzero()[:, 0]
        if free.numel() < number:
            more = max(number - free.numel(), room)
            self.pages_k, self.pages_v = (
                torch.cat([x, x.new_empty(more, *x.shape[1:])])
                for x in (self.pages_k, self.pages_v)
            )
            free = torch.cat([free, torch.arange(room, room + more, device=free.device)])
        return free[:number]
