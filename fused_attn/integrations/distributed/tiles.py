"""Attention of some queries over some keys, both pieces of longer sequences, by the usual kernels.

A kernel knows no positions but its tensors'. Causal and window masks of the whole sequence become a
window of the piece: with t the difference of the two diagonals, -right <= d + t <= left. A window
that begins off the piece's diagonal is one that begins on it, of fewer queries or keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.attention.api import attention, merge_attention
from ...ops.attention.backward import attention_backward
from ...runtime import philox
from .layouts import Piece


class Tile(NamedTuple):
    """One call of a kernel: rows of the parts, and the mask between them."""

    queries: slice
    keys: slice
    query_position: int  # of the first query and key, in the whole sequence
    key_position: int
    causal: Any
    window: tuple[int, int] | None


@dataclass(frozen=True)
class Band:
    """Visible is -right <= position of the query - position of the key <= left; -1 for no limit."""

    left: int = -1
    right: int = -1
    shift: int = 0  # of the queries' positions: Lk - Lq, where the last are aligned

    @property
    def sees_all(self) -> bool:
        return self.left < 0 and self.right < 0

    def tile(self, queries: Piece, keys: Piece) -> Tile | None:
        """What of the two pieces meets; None where nothing does."""
        nq, nk = queries.length, keys.length
        start = queries.position + self.shift - keys.position  # position difference of both firsts
        if nq == 0 or nk == 0:
            return None
        nearest, furthest = start - (nk - 1), start + nq - 1
        if (0 <= self.left < nearest) or (self.right >= 0 and furthest < -self.right):
            return None
        cut_left = 0 <= self.left < furthest
        cut_right = self.right >= 0 and nearest < -self.right
        if cut_left:  # the last queries are too far from every key
            nq -= max(0, start - (nk - nq) - self.left)
        if cut_right:  # no query comes near the last keys
            nk -= max(0, -(start - (nk - nq) + self.right))
        t = start - (nk - nq)
        left = self.left - t if cut_left else -1
        right = self.right + t if cut_right else -1
        causal: Any = "lower_right" if (left, right) == (-1, 0) else False
        window = (left, right) if (left, right) not in ((-1, 0), (-1, -1)) else None
        return Tile(
            slice(queries.row, queries.row + nq),
            slice(keys.row, keys.row + nk),
            queries.position,
            keys.position,
            causal,
            window,
        )

    def tiles(self, queries: tuple[Piece, ...], keys: tuple[Piece, ...]) -> Iterator[Tile]:
        """All that two parts have in common, in a fixed order."""
        for of_keys in keys:
            for of_queries in queries:
                found = self.tile(of_queries, of_keys)
                if found is not None:
                    yield found


class Keys(NamedTuple):
    """A part of the keys, as it goes round: tensors alone."""

    k: Tensor  # (B, Hkv, Lk, D)
    v: Tensor  # (B, Hkv, Lk, Dv)
    padding: Tensor | None  # (B, Lk) bool, True = visible
    documents: Tensor | None  # (B, Lk) int64


@dataclass(frozen=True)
class Dropout:
    """One mask for the whole: of the heads `first` to `first + H` out of `heads`."""

    p: float
    rng: Tensor  # (2,)
    heads: int
    first: int = 0

    def kept(self, batch: int, heads: int, rows: range, columns: range) -> Tensor:
        """Which probabilities survive, (batch, heads, rows, columns) bool, by whole positions."""
        device = self.rng.device
        head = torch.arange(batch, device=device)[:, None] * self.heads + self.first
        head = (head + torch.arange(heads, device=device)).flatten()[:, None, None]
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        quads = torch.arange(columns.start // 4, (columns.stop + 3) // 4, device=device)
        drawn = philox.words((quads, row, head, self.rng[1] & 0xFFFFFFFF), self.rng[0])
        drawn = drawn.flatten(-2)[..., columns.start % 4 :][..., : len(columns)]
        kept = drawn >= philox.threshold(self.p)
        return kept.view(batch, heads, len(rows), len(columns))


# Probabilities whose fate is drawn at once: 64-bit words of them are what takes memory.
_DRAWN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Mathematics:
    """What is the same in all tiles of a call."""

    scale: float | None
    softcap: float | None
    dropout: Dropout | None
    backend: str | None

    def _options(self, tile: Tile, keys: Keys, documents: Tensor | None) -> dict[str, Any]:
        found: dict[str, Any] = {"causal": tile.causal, "window": tile.window}
        found |= {"scale": self.scale, "softcap": self.softcap, "backend": self.backend}
        if keys.padding is not None:
            found["key_padding_mask"] = keys.padding[:, tile.keys]
        if keys.documents is not None and documents is not None:
            found["document_ids"] = (documents[:, tile.queries], keys.documents[:, tile.keys])
        return found

    def add_forward(
        self, tile: Tile, q: Tensor, documents: Tensor | None, keys: Keys, out: Tensor, lse: Tensor
    ) -> None:
        """Join this tile's attention to out (B, H, Lq, Dv) and lse (B, H, Lq), both float32."""
        for part in self._parts(tile, q):
            options = self._options(part, keys, documents)
            tensors = (q[:, :, part.queries], keys.k[:, :, part.keys], keys.v[:, :, part.keys])
            found, found_lse = attention(*tensors, **options, return_lse=True)
            if self.dropout is not None:
                found = self._kept(part, tensors, options, found_lse)
            at = (slice(None), slice(None), part.queries)
            out[at], lse[at] = merge_attention(out[at], lse[at], found.to(out.dtype), found_lse)

    def _kept(
        self, tile: Tile, tensors: tuple[Tensor, ...], options: dict[str, Any], lse: Tensor
    ) -> Tensor:
        """The output after dropout: attention over the kept keys, by their share of the whole."""
        assert self.dropout is not None
        mask = self._mask(tile, tensors[0])
        found, kept_lse = attention(*tensors, **options, mask=mask, return_lse=True)
        share = torch.exp(kept_lse - torch.where(lse == -torch.inf, 0.0, lse))
        kept = 1.0 - self.dropout.p
        return found.to(lse.dtype) * (share / kept if kept else share * 0.0)[..., None]

    def _mask(self, tile: Tile, q: Tensor) -> Tensor:
        assert self.dropout is not None
        nq, nk = q.shape[2], tile.keys.stop - tile.keys.start
        rows = range(tile.query_position, tile.query_position + nq)
        columns = range(tile.key_position, tile.key_position + nk)
        return self.dropout.kept(q.shape[0], q.shape[1], rows, columns)

    def _parts(self, tile: Tile, q: Tensor) -> Iterator[Tile]:
        """`tile`; or a few queries of it at a time, where bits of each pair are drawn."""
        nq, nk = (s.stop - s.start for s in (tile.queries, tile.keys))
        step = nq
        if self.dropout is not None:
            step = min(nq, max(1, _DRAWN_AT_ONCE // max(1, q.shape[0] * q.shape[1] * nk)))
        if step == nq:
            yield tile
            return
        # The mask of the tile as a band of its own, from which that of each part follows.
        left, right = tile.window or (-1, -1)
        band = Band(left, 0 if tile.causal else right, nk - nq)
        for first in range(0, nq, step):
            queries = Piece(first, tile.queries.start + first, min(step, nq - first))
            part = band.tile(queries, Piece(0, tile.keys.start, nk))
            if part is not None:
                yield part._replace(
                    query_position=tile.query_position + first, key_position=tile.key_position
                )

    def backward(
        self,
        tile: Tile,
        q: Tensor,
        documents: Tensor | None,
        keys: Keys,
        rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Add this tile's gradients to dq, dk and dv.

        Args:
            rows: out, lse, dout and dlse of the whole, dlse may be None.
        """
        for part in self._parts(tile, q):
            options = self._options(part, keys, documents)
            tensors = (q[:, :, part.queries], keys.k[:, :, part.keys], keys.v[:, :, part.keys])
            out, lse, dout = rows[0], rows[1], rows[2]
            out, lse, dout = (x[:, :, part.queries] for x in (out, lse, dout))
            dlse = None if rows[3] is None else rows[3][:, :, part.queries]
            found: list[tuple[float, Any]] = []
            if self.dropout is None:
                whole = attention_backward(dout, *tensors, out, lse, dlse=dlse, **options)
                found.append((1.0, whole))
            else:
                found = self._through_dropout(part, tensors, options, out, lse, dout, dlse)
            for factor, (dq, dk, dv, _, _) in found:
                for total, at, grad in zip(
                    grads, (part.queries, part.keys, part.keys), (dq, dk, dv), strict=True
                ):
                    if grad is not None:
                        total[:, :, at].add_(grad, alpha=factor)

    def _through_dropout(
        self,
        tile: Tile,
        tensors: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> list[tuple[float, Any]]:
        """Gradients of the kept and of the dropped probabilities, and what to multiply them by.

        With c = 1 / (1 - p) and e = rowsum(out dout) - dlse, the score of a kept probability P has
        the gradient P (c dP - e) = c P (dP - (1 - p) e), that of a dropped one -P e.
        """
        assert self.dropout is not None
        delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(dim=-1)
        through = delta if dlse is None else delta - dlse
        mask, kept = self._mask(tile, tensors[0]), 1.0 - self.dropout.p
        of_rows = (tensors, out, lse)
        found = []
        if kept:
            found.append(
                (1.0 / kept, _gradients(dout, of_rows, delta - kept * through, options, mask))
            )
        nothing = torch.zeros_like(dout)
        found.append((1.0, _gradients(nothing, of_rows, -through, options, ~mask)))
        return found


def _gradients(
    dout: Tensor,
    rows: tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor],
    dlse: Tensor,
    options: dict[str, Any],
    mask: Tensor,
) -> Any:
    (q, k, v), out, lse = rows
    return attention_backward(dout, q, k, v, out, lse, dlse=dlse, mask=mask, **options)
