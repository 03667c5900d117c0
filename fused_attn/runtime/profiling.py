"""Named ranges for torch.profiler: one an operation and pass, with the backend's name.

Nobody pays for them who does not profile: who runs an operation asks `profiler` first, and takes
another way through the code only where it says so.
"""

from __future__ import annotations

import contextlib

import torch

# To read `profiler._is_profiler_enabled` takes 30 ns; torch keeps it for uses like this one.
from torch.autograd import profiler as profiler


def recorded(what: str, backend: str) -> contextlib.AbstractContextManager[object]:
    """A range called `fused_attn::what[backend]`."""
    return torch.profiler.record_function(f"fused_attn::{what}[{backend}]")
