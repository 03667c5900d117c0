"""Whether the sequence of the tensors that come in is whole, or one rank's part of a longer one.

Inside `integrations.distributed.context_parallel`, and inside torch's own `context_parallel`, a
tensor holds a part. What looks across positions or counts them asks here: attention runs over the
parts of all ranks, positions count from where the part begins, and what can do neither refuses.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Shards(Protocol):
    """How a sequence is spread, and who runs attention over all of it."""

    def attend(self, operands: Any, scalars: Any) -> tuple[Tensor, Tensor | None, None]:
        """out and lse (if asked for) of `attention` on this rank's queries and all keys."""
        ...

    def positions(self, length: int, device: torch.device) -> Tensor:
        """(length,) int64: where in the whole sequence the rows of this rank's part are."""
        ...

    def is_part(self, rows: int, length: int) -> bool:
        """Whether a table of `rows` positions is cut up as a part of `length` positions is."""
        ...


shards: Shards | None = None  # of our own context; read it by `current`
_TORCHS_ATTENTION = torch._C._nn.scaled_dot_product_attention
# Who knows torch's context; by name, since nothing inside imports a door.
_DOOR = "fused_attn.integrations.distributed.torchs_context"


def is_cut() -> bool:
    """False where the sequence is whole for certain; where True, `current` knows."""
    return shards is not None or F.scaled_dot_product_attention is not _TORCHS_ATTENTION


def current() -> Shards | None:
    """Of the context that is open, ours or torch's; None where the sequence is whole."""
    if shards is not None:
        return shards
    if _paused or F.scaled_dot_product_attention is _TORCHS_ATTENTION:
        return None
    return importlib.import_module(_DOOR).shards()


_paused = False


@contextlib.contextmanager
def entered(inside: Shards | None) -> Iterator[None]:
    """Within this the sequence is spread as `inside` says; None: what comes in is whole."""
    global shards, _paused
    before, shards = shards, inside
    was_paused, _paused = _paused, inside is None
    try:
        yield
    finally:
        shards, _paused = before, was_paused


def expect_whole(what: str, hint: str) -> None:
    """Refuse `what`, which would take a part for the whole.

    Raises:
        NotImplementedError: a context is open in which the sequence is spread.
    """
    if is_cut() and current() is not None:
        raise NotImplementedError(
            f"{what} sees one rank's part of the sequence inside `context_parallel`, and cannot "
            f"look at the others'\nhint: {hint}"
        )


def positions(length: int, offset: int, device: torch.device) -> Tensor:
    """(length,) int64: offset, offset + 1, ..., or where this rank's part has them."""
    spread = current() if is_cut() else None
    if spread is None:
        return torch.arange(offset, offset + length, device=device)
    return spread.positions(length, device) + offset


def rows_of(table_rows: int, length: int, offset: int, device: torch.device) -> Tensor | None:
    """Rows of a table of positions that this rank's part reads; None for offset, offset + 1, ..."""
    spread = current() if is_cut() else None
    if spread is None or spread.is_part(table_rows, length):
        return None
    return spread.positions(length, device) + offset
