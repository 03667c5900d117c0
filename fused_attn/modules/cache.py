"""Keys and values of positions already seen, so that the next ones need not compute them again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..runtime import checks


class Cache(Protocol):
    """What the attention of a module asks of its cache."""

    @property
    def length(self) -> int:
        """Positions that are stored."""
        ...

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k (N, H, L, D) and v behind the rest; all that is stored, (N, H, length, D)."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Go on with what row `rows[i]` of the batch holds as row i; rows (M,) int64."""
        ...


class KeyValueCache:
    """Keys and values of one self-attention.

    With `max_len` memory is allocated once, by the first call, and later ones write into it;
    without it the memory doubles whenever it is full. Where gradients are wanted, nothing is
    overwritten: each call then copies what is stored.

    Args:
        max_len: positions that fit; None: any number.

    Attributes:
        k, v: (N, H, length, D), views of what is stored; None while nothing is.
        length: positions that are stored.

    Raises:
        TypeError, ValueError: `max_len` is no integer above 0.
    """

    _FIRST = 64  # positions, where nobody says how many there will be

    def __init__(self, max_len: int | None = None) -> None:
        if max_len is not None:
            checks.expect_integer("max_len", max_len, 1)
        self.max_len = max_len
        self.length = 0
        self._k: Tensor | None = None  # (N, H, room, D)
        self._v: Tensor | None = None

    @property
    def k(self) -> Tensor | None:
        return None if self._k is None else self._k[:, :, : self.length]

    @property
    def v(self) -> Tensor | None:
        return None if self._v is None else self._v[:, :, : self.length]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Cache`.

        Raises:
            ValueError: they do not fit, or are of another batch, dtype or device than before.
        """
        end = self.length + k.shape[2]
        expect_like("cache", self._k, k)
        if self.max_len is not None and end > self.max_len:
            raise ValueError(
                f"`cache` holds max_len={self.max_len} positions, got {end}: "
                f"{self.length} stored and {k.shape[2]} new"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or self._wants_grad()):
            self._k, self._v = _joined(self.k, k), _joined(self.v, v)
        else:
            self._make_room(end, k, v)
            assert self._k is not None
            assert self._v is not None
            self._k[:, :, self.length : end] = k
            self._v[:, :, self.length : end] = v
        self.length = end
        return cast(Tensor, self.k), cast(Tensor, self.v)

    def reorder(self, rows: Tensor) -> None:
        """As of `Cache`."""
        self._k, self._v = (None if x is None else x.index_select(0, rows) for x in self._both())

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on, as after tokens that were only guessed.

        Raises:
            ValueError: fewer are stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"`length` must be in [0, {self.length}], got {length}")
        self.length = length

    def _both(self) -> tuple[Tensor | None, Tensor | None]:
        return self._k, self._v

    def _wants_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self._both())

    def _make_room(self, end: int, k: Tensor, v: Tensor) -> None:
        """Memory for `end` positions, of which those stored are kept."""
        if self._k is not None and self._k.shape[2] >= end and not self._wants_grad():
            return
        room = self.max_len or max(self._FIRST, 1 << (end - 1).bit_length())
        before = (self.k, self.v)
        self._k, self._v = (x.new_empty((*x.shape[:2], room, x.shape[3])) for x in (k, v))
        for new, old in zip((self._k, self._v), before, strict=True):
            if old is not None:
                new[:, :, : self.length] = old.detach()


class MemoryCache:
    """Keys and values of a cross-attention, whose memory stays the same from step to step.

    The first call keeps those that it computes; later calls compute the queries alone, and take
    the memory that they are given for the same one.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None  # (N, H, S, D)
        self.v: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def reorder(self, rows: Tensor) -> None:
        """As of `Cache`."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)


@dataclass
class LayerCache:
    """What one decoder layer keeps between the tokens: of its self- and its cross-attention."""

    own: Any = field(default_factory=KeyValueCache)  # a `Cache`
    memory: MemoryCache = field(default_factory=MemoryCache)

    @property
    def length(self) -> int:
        return self.own.length

    def reorder(self, rows: Tensor) -> None:
        """As of `Cache`."""
        self.own.reorder(rows)
        self.memory.reorder(rows)


def reorder_all(caches: Any, rows: Tensor) -> None:
    """`reorder` of every cache in a nest of lists and dictionaries.

    Raises:
        TypeError: something in it has no `reorder`.
    """
    if hasattr(caches, "reorder"):
        caches.reorder(rows)
    elif isinstance(caches, dict):
        reorder_all(caches.values(), rows)
    elif isinstance(caches, Iterable) and not isinstance(caches, (str, Tensor)):
        for cache in caches:
            reorder_all(cache, rows)
    else:
        raise TypeError(
            "a cache must have `reorder(rows)`, or be a list or dictionary of such, "
            f"got {checks.type_name(caches)}"
        )


def expect_like(name: str, stored: Tensor | None, new: Tensor) -> None:
    """Raise ValueError where new keys do not fit those that are stored (N, H, ..., D)."""
    if stored is None:
        return
    mine = (stored.shape[0], stored.shape[1], stored.shape[3], stored.dtype, stored.device)
    theirs = (new.shape[0], new.shape[1], new.shape[3], new.dtype, new.device)
    if mine != theirs:
        raise ValueError(
            f"`{name}` holds (batch, heads, head size, dtype, device) {_listed(mine)}, "
            f"got {_listed(theirs)}"
        )


def _listed(values: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, values))})"


def _joined(stored: Tensor | None, new: Tensor) -> Tensor:
    return new if stored is None else torch.cat([stored, new], dim=2)
