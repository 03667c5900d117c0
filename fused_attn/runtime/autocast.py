"""Whether autocast is on for a device, asked in a way that every device answers."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def enabled(device: torch.device) -> bool:
    """True where autocast is on for tensors on `device`; torch raises for meta tensors instead."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """No autocast on `device` within it."""
    if not enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def dtype_for(x: object) -> torch.dtype | None:
    """The dtype that autocast gives to the operands of a product with x.

    None where it changes nothing: it is off, x is float64, or no tensor of floats.
    """
    if not isinstance(x, Tensor) or not enabled(x.device):
        return None
    if x.dtype == torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(x.device.type)
