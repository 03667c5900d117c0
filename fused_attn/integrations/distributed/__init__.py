"""More than one machine, with torch.distributed as the engine (docs/distributed.md)."""

from .dtensors import register

__all__ = ["register"]
