"""What encoder and decoder layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from .attention import FusedMultiheadAttention
from .layer_norm import FusedLayerNorm

Activation = str | Callable[[Tensor], Tensor]


def fuse_children(layer: nn.Module) -> None:
    """Turn the modules that torch.nn's constructor made into ours; their parameters stay."""
    for child in layer.children():
        if type(child) is nn.MultiheadAttention:
            child.__class__ = FusedMultiheadAttention
        elif type(child) is nn.LayerNorm:
            child.__class__ = FusedLayerNorm


def check_nested(
    inputs: Iterable[Tensor], masks: Iterable[Tensor | None], batch_first: bool
) -> None:
    """Raise AssertionError for NestedTensors that a layer cannot take, or not with such masks."""
    for x in inputs:
        if x.dim() != 3:
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor outside of batches (N, *, E), "
                f"got one of {x.dim()} dimensions"
            )
    if any(mask is not None for mask in masks):
        raise AssertionError(
            "NestedTensors must come without masks: their lengths say what is padding\n"
            "hint: leave the masks out; `is_causal=True` is taken beside them"
        )
    if not batch_first:
        raise AssertionError(
            "NestedTensors need batch_first=True, got False\n"
            "hint: `batch_first=True` in the constructor"
        )
