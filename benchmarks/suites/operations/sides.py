"""Our sides of an operation: one for each module of its `BACKENDS`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fused_attn.ops import dispatch

from ..problem import Prepared, Side

ORACLE = "is the oracle; measured if asked for by name"


def our_sides(
    backends: Sequence[Any],
    description: Any,
    prepare: Callable[[str, dict[str, Tensor]], Prepared],
) -> list[Side]:
    """Every backend, asked what it has against the call that is described."""
    reasons = dict(dispatch.explain(backends, description).reasons)
    return [
        Side(
            f"fused_attn:{backend.NAME}",
            functools.partial(prepare, backend.NAME),
            reasons[backend.NAME],
            _by_name(backend, description),
        )
        for backend in backends
    ]


def _by_name(backend: Any, description: Any) -> str:
    if backend.NAME == "reference":
        return ORACLE
    why = dispatch.only_by_name(backend, description)
    return "" if why is None else f"{why}; measured if asked for by name"
