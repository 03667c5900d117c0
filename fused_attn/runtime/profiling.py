"""Named ranges for torch.profiler: one an operation and pass, with the backend's name.

Nobody pays for them who does not profile: who runs an operation asks `profiler` first, and takes
another way through the code only where it says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

# To read `profiler._is_profiler_enabled` takes 30 ns; torch keeps it for uses like this one.
from torch.autograd import profiler as profiler

P = ParamSpec("P")
R = TypeVar("R")


def recorded(what: str, backend: str) -> contextlib.AbstractContextManager[object]:
    """A range called `fused_attn::what[backend]`."""
    return torch.profiler.record_function(f"fused_attn::{what}[{backend}]")


def call(
    what: str, backend: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> R:
    """`function(*args)`; within such a range where a profiler is on."""
    if profiler._is_profiler_enabled:
        with recorded(what, backend):
            return function(*args, **kwargs)
    return function(*args, **kwargs)
