"""Every caller of torch's `flex_attention` gets ours: eager, with a backward on the CPU, at once.

    from fused_attn.integrations import flex

    flex.activate()          # until flex.restore()
    with flex.activated():   # or for a while
        model(x)

It replaces `torch.nn.attention.flex_attention.flex_attention`. Who imported the function under a
name of his own before keeps torch's.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch.nn.attention import flex_attention as torch_flex

from ..flex.api import flex_attention
from .switch import for_a_while

__all__ = ["activate", "activated", "is_active", "restore"]

_before: list[Any] = []


def activate() -> None:
    """Put our function in the place of torch's, in this process; again does nothing."""
    if not _before:
        _before.append(torch_flex.flex_attention)
        torch_flex.flex_attention = flex_attention


def restore() -> None:
    """Put back what was there before `activate`; without it does nothing."""
    if _before:
        torch_flex.flex_attention = _before.pop()


def is_active() -> bool:
    return bool(_before)


def activated() -> contextlib.AbstractContextManager[None]:
    """`activate()` for the body of a `with`; it leaves active what was active before."""
    return for_a_while(is_active, activate, restore)
