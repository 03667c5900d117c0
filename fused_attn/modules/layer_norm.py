"""Drop-in norm modules: torch.nn's parameters, state_dict and errors, fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.layer_norm import api as norms
from .scripting import NotScriptable

_DISABLED = torch._C._disabled_torch_function_impl


class FusedLayerNorm(NotScriptable, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on fused kernels: same arguments, parameters, results and errors."""

    def forward(self, input: Tensor) -> Tensor:
        if _wants_torch(input, self.weight, self.bias):
            return super().forward(input)
        return _as_torch_raises(
            norms.layer_norm, input, self.normalized_shape, self.weight, self.bias, self.eps
        )


class FusedRMSNorm(NotScriptable, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on fused kernels: same arguments, parameters, results and errors."""

    def forward(self, x: Tensor) -> Tensor:
        if _wants_torch(x, self.weight):
            return super().forward(x)
        return _as_torch_raises(norms.rms_norm, x, self.normalized_shape, self.weight, self.eps)


class FusedAddLayerNorm(NotScriptable, torch.nn.LayerNorm):
    """Dropout, residual connection and layer norm in one pass, with torch.nn.LayerNorm's state.

    In plain PyTorch::

        h = F.dropout(x, dropout, self.training) + residual
        y = F.layer_norm(h, normalized_shape, self.weight, self.bias, eps)

    Args:
        dropout: probability of dropping an element of x in training.
        return_sum: return (y, h), as a pre-norm block wants, instead of y.
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
    """

    # On the class as well: an nn.LayerNorm whose class is swapped has neither attribute.
    dropout: float = 0.0
    return_sum: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout: float = 0.0,
        return_sum: bool = False,
    ) -> None:
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout
        self.return_sum = return_sum

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor,
        *,
        out: Tensor | None = None,
        sum_out: Tensor | None = None,
    ) -> Any:
        """y, or (y, h) with `return_sum`.

        Args:
            x, residual: (*, *normalized_shape).
            out, sum_out: write y or h here; no gradient may be wanted. `sum_out=residual` updates
                the residual stream in place.
        """
        return norms.add_layer_norm(
            x,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            return_sum=self.return_sum,
            out=out,
            sum_out=sum_out,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}, return_sum={self.return_sum}"


class FusedAddRMSNorm(NotScriptable, torch.nn.RMSNorm):
    """Dropout, residual connection and RMSNorm in one pass, with torch.nn.RMSNorm's state.

    As `FusedAddLayerNorm`, with the norm of torch.nn.RMSNorm.
    """

    dropout: float = 0.0
    return_sum: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout: float = 0.0,
        return_sum: bool = False,
    ) -> None:
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.dropout = dropout
        self.return_sum = return_sum

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor,
        *,
        out: Tensor | None = None,
        sum_out: Tensor | None = None,
    ) -> Any:
        """y, or (y, h) with `return_sum`; the arguments of `FusedAddLayerNorm.forward`."""
        return norms.add_rms_norm(
            x,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            return_sum=self.return_sum,
            out=out,
            sum_out=sum_out,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}, return_sum={self.return_sum}"


def _wants_torch(x: object, *parameters: Tensor | None) -> bool:
    """True for NestedTensors, and for tensors that want to see torch's own function.

    Such are those of `torch.nn.utils._per_sample_grad`, and torch.fx's proxies.
    """
    if isinstance(x, Tensor) and x.is_nested:
        return True
    return any(
        [
            type(t) not in (Tensor, torch.nn.Parameter, type(None))
            and getattr(t, "__torch_function__", _DISABLED) is not _DISABLED
            for t in (x, *parameters)
        ]
    )


def _as_torch_raises(norm: Any, x: Tensor, *arguments: Any) -> Tensor:
    """torch.nn raises RuntimeError for a tensor that does not fit, TypeError for no tensor."""
    try:
        return norm(x, *arguments)
    except (TypeError, ValueError) as error:
        if isinstance(x, Tensor):
            raise RuntimeError(str(error)) from error
        raise
