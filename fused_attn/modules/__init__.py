"""Drop-in subclasses of the torch.nn classes."""

from .layer_norm import FusedAddLayerNorm, FusedAddRMSNorm, FusedLayerNorm, FusedRMSNorm

__all__ = ["FusedAddLayerNorm", "FusedAddRMSNorm", "FusedLayerNorm", "FusedRMSNorm"]
