"""Doors: one file for each library whose models reach the kernels by one line.

Nothing inside the package imports a door, a door patches nothing when it is imported, and what it
puts in place it can take back.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType

_DOORS = ("distributed", "flash_attn", "flex", "torch_sdpa", "transformers")


def __getattr__(name: str) -> _ModuleType:
    """A door is imported when somebody asks: `fused_attn.integrations.flash_attn.install()`."""
    if name in _DOORS:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
