"""Whether autocast is on for a device, asked in a way that every device answers."""

from __future__ import annotations

import torch


def enabled(device: torch.device) -> bool:
    """True where autocast is on for tensors on `device`; torch raises for meta tensors instead."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
