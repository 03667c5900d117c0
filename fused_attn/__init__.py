"""Fused attention for PyTorch: drop-in modules and the functions behind them."""

from .dispatch import UnsupportedError
from .functional import (
    attention,
    attention_backends,
    attention_varlen,
    explain,
    last_backend,
    merge_attention,
)
from .sdpa import scaled_dot_product_attention

__all__ = [
    "UnsupportedError",
    "attention",
    "attention_backends",
    "attention_varlen",
    "explain",
    "last_backend",
    "merge_attention",
    "scaled_dot_product_attention",
]
