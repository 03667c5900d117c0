"""norm(residual + dropout(x)) as one operation, where the modules concerned are plain.

A module is plain if calling it does nothing but what its class says: no hooks, no replaced forward,
parameters that are ordinary tensors. Everything else is called as the module that it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.layer_norm import api as norms
from .layer_norm import FusedLayerNorm, FusedRMSNorm

_LAYER_NORMS = (nn.LayerNorm, FusedLayerNorm)
_RMS_NORMS = (nn.RMSNorm, FusedRMSNorm)
_PLAIN_TENSORS = (Tensor, nn.Parameter, type(None))


def has_hooks(module: nn.Module) -> bool:
    """True if a call of `module` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or torch_module._has_any_global_hook()
    )


def is_plain_tensor(tensor: object) -> bool:
    """True for one of torch's own tensors, or none: no quantized, sharded or other subclass."""
    return type(tensor) in _PLAIN_TENSORS


def add_norm(x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module) -> Tensor:
    """norm(residual + dropout(x)), as a post-norm block wants it; x and residual (..., E)."""
    if _is_fusible(dropout, norm):
        return _fused(x, residual, dropout, norm, return_sum=False)
    return norm(residual + dropout(x))


def add_norm_sum(
    x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """norm(h) and h = residual + dropout(x), as a pre-norm block wants it."""
    if _is_fusible(dropout, norm):
        return _fused(x, residual, dropout, norm, return_sum=True)
    h = residual + dropout(x)
    return norm(h), h


def _is_fusible(dropout: nn.Module, norm: nn.Module) -> bool:
    return (
        type(norm) in (*_LAYER_NORMS, *_RMS_NORMS)
        and type(dropout) is nn.Dropout
        and not has_hooks(norm)
        and not has_hooks(dropout)
        and is_plain_tensor(norm.weight)
        and is_plain_tensor(getattr(norm, "bias", None))
    )


def _fused(x: Tensor, residual: Tensor, dropout: Any, norm: Any, return_sum: bool) -> Any:
    settings = {
        "eps": norm.eps,
        "dropout_p": dropout.p if dropout.training else 0.0,
        "return_sum": return_sum,
        "weight_offset": getattr(norm, "weight_offset", 0.0),
    }
    if type(norm) in _RMS_NORMS:
        return norms.add_rms_norm(x, residual, norm.normalized_shape, norm.weight, **settings)
    shape = norm.normalized_shape
    return norms.add_layer_norm(x, residual, shape, norm.weight, norm.bias, **settings)
