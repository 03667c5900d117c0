"""The activations and the dropout of rows in plain torch: what kernels of several operations do."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import hints, philox

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "gelu_tanh", "silu")


def expect_activation(activation: object, also: str = "") -> str:
    """`activation`, which must be one of ACTIVATIONS.

    Args:
        also: what else may be given, for the message.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        message = f"`activation` must be one of {known}{also}, got {activation!r}"
        raise ValueError(hints.with_hint(message, hints.for_activation(activation)))
    return activation


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation called `activation` of x."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def dropout(y: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """Y / (1 - p) where it is kept, else 0."""
    if dropout_p == 1.0:
        return torch.where(torch.zeros_like(y, dtype=torch.bool), y, 0.0)
    keep = philox.kept_in_rows(rng, dropout_p, math.prod(y.shape[:-1]), y.shape[-1])
    return torch.where(keep.reshape(y.shape), y / (1.0 - dropout_p), 0.0)
