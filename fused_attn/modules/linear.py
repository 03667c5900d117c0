"""Linear layers by `fused_attn.linear`, where they are plain; a drop-in for nn.Linear."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops import dispatch
from ..ops.linear import api, measured
from ..ops.linear.torch_linear import torch_linear
from .residual import has_hooks, is_plain_tensor
from .scripting import NotScriptable


class FusedLinear(NotScriptable, nn.Linear):
    """`torch.nn.Linear` by whichever product is the faster one here: ours or torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear, FusedLinear)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, (*, in) -> (*, out)."""
    if measured.is_never_ours(x) or not dispatch.is_plain((x, weight, bias)) or x.is_nested:
        return torch_linear(x, weight, bias)
    return api.linear(x, weight, bias)


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """True if calling `linear` is a product with its parameters, and nothing else."""
    return (
        type(linear) in LINEARS
        and not has_hooks(linear)
        and is_plain_tensor(linear.weight)
        and is_plain_tensor(linear.bias)
        and (linear.bias is None or linear.bias.dtype == linear.weight.dtype)
    )


def call_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`: the product where that is all it does, else the module that it is."""
    if measured.is_never_ours(x) or not is_plain(linear):
        return linear(x)
    return project(x, linear.weight, linear.bias)
