"""The command `python -m fused_attn selftest`: are the kernels right on this machine.

Each operation and backend that could run here is held against float64 in a process of its own, so
that a hang or a fault that sticks ends one case and not the test. What passed is recorded: GPU
backends serve by default only what a record says.
"""

from .run import main

__all__ = ["main"]
