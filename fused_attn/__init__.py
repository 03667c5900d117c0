"""Fused attention for PyTorch: drop-in modules and the functions behind them."""

from .dispatch import UnsupportedError
from .functional import attention, attention_varlen, explain, last_backend, merge_attention

__all__ = [
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "explain",
    "last_backend",
    "merge_attention",
]
