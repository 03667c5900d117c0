"""Drop-in norm modules: torch.nn's parameters, state_dict and errors, fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.layer_norm import api as norms
from ..runtime import checks
from .scripting import NotScriptable

_DISABLED = torch._C._disabled_torch_function_impl


class FusedLayerNorm(NotScriptable, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on fused kernels: same arguments, parameters, results and errors.

    Args:
        weight_offset: added to the weight (1 where a checkpoint says what the weight differs from
            1 by); the weight starts as 1 - weight_offset.
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
    """

    weight_offset: float = 0.0  # on the class as well, see FusedAddLayerNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = _checked_offset(weight_offset, elementwise_affine)
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _start_at_one(self)

    def forward(self, input: Tensor) -> Tensor:
        if _wants_torch(input, self.weight, self.bias):
            if not self.weight_offset:
                return super().forward(input)
            wide, weight = input.to(_wide(self.weight)), _raised(self)
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            y = F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps)
            return y.to(input.dtype)
        return _as_torch_raises(
            norms.layer_norm, input, self.normalized_shape, self.weight, self.bias, self.eps,
            weight_offset=self.weight_offset,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _offset_repr(self.weight_offset)


class FusedRMSNorm(NotScriptable, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on fused kernels: same arguments, parameters, results and errors.

    Args:
        weight_offset: added to the weight (Gemma: 1); the weight starts as 1 - weight_offset.
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch.nn.RMSNorm.
    """

    weight_offset: float = 0.0  # on the class as well, see FusedAddLayerNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = _checked_offset(weight_offset, elementwise_affine)
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        _start_at_one(self)

    def forward(self, x: Tensor) -> Tensor:
        if _wants_torch(x, self.weight):
            if not self.weight_offset:
                return super().forward(x)
            wide, weight = x.to(_wide(self.weight)), _raised(self)
            return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)
        return _as_torch_raises(
            norms.rms_norm, x, self.normalized_shape, self.weight, self.eps,
            weight_offset=self.weight_offset,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _offset_repr(self.weight_offset)


class FusedAddLayerNorm(NotScriptable, torch.nn.LayerNorm):
    """Dropout, residual connection and layer norm in one pass, with torch.nn.LayerNorm's state.

    In plain PyTorch::

        h = F.dropout(x, dropout, self.training) + residual
        y = F.layer_norm(h, normalized_shape, self.weight, self.bias, eps)

    Args:
        dropout: probability of dropping an element of x in training.
        return_sum: return (y, h), as a pre-norm block wants, instead of y.
        weight_offset: as in `FusedLayerNorm`.
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
    """

    # On the class as well: an nn.LayerNorm whose class is swapped has none of these attributes.
    dropout: float = 0.0
    return_sum: bool = False
    weight_offset: float = 0.0

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
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = _checked_offset(weight_offset, elementwise_affine)
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout
        self.return_sum = return_sum

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _start_at_one(self)

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
            weight_offset=self.weight_offset,
            dropout_p=self.dropout if self.training else 0.0,
            return_sum=self.return_sum,
            out=out,
            sum_out=sum_out,
        )

    def extra_repr(self) -> str:
        own = f"dropout={self.dropout}, return_sum={self.return_sum}"
        return f"{super().extra_repr()}, {own}{_offset_repr(self.weight_offset)}"


class FusedAddRMSNorm(NotScriptable, torch.nn.RMSNorm):
    """Dropout, residual connection and RMSNorm in one pass, with torch.nn.RMSNorm's state.

    As `FusedAddLayerNorm`, with the norm of `FusedRMSNorm` and its `weight_offset`.
    """

    dropout: float = 0.0
    return_sum: bool = False
    weight_offset: float = 0.0

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
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = _checked_offset(weight_offset, elementwise_affine)
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.dropout = dropout
        self.return_sum = return_sum

    def reset_parameters(self) -> None:
        _start_at_one(self)

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
            weight_offset=self.weight_offset,
            dropout_p=self.dropout if self.training else 0.0,
            return_sum=self.return_sum,
            out=out,
            sum_out=sum_out,
        )

    def extra_repr(self) -> str:
        own = f"dropout={self.dropout}, return_sum={self.return_sum}"
        return f"{super().extra_repr()}, {own}{_offset_repr(self.weight_offset)}"


def _checked_offset(weight_offset: Any, elementwise_affine: bool) -> float:
    offset = checks.expect_finite("weight_offset", weight_offset)
    if offset and not elementwise_affine:
        raise ValueError(
            f"`weight_offset` must be 0 where `elementwise_affine` is False, got {offset:g}"
        )
    return offset


def _start_at_one(norm: Any) -> None:
    if norm.weight is not None:
        torch.nn.init.constant_(norm.weight, 1.0 - norm.weight_offset)


def _wide(weight: Tensor) -> torch.dtype:
    """The dtype in which the kernels add an offset to `weight`: float32, or float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def _raised(norm: Any) -> Tensor:
    return norm.weight.to(_wide(norm.weight)) + norm.weight_offset


def _offset_repr(weight_offset: float) -> str:
    return f", weight_offset={weight_offset:g}" if weight_offset else ""


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


def _as_torch_raises(norm: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """torch.nn raises RuntimeError for a tensor that does not fit, TypeError for no tensor."""
    try:
        return norm(x, *arguments, **named)
    except (TypeError, ValueError) as error:
        if isinstance(x, Tensor):
            raise RuntimeError(str(error)) from error
        raise
