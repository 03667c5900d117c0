"""Which modules and functions treat each token by itself, so that packed tokens may run through.

Asked by exact type: a subclass, a hook, a `forward` or a parametrization put on one module may look
at other positions, and would see (T, E) in the place of (N, L, E). What is not known here is called
on padded batches, unless it says of itself `token_wise = True`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layer_norm import FusedLayerNorm, FusedRMSNorm
from .linear import LINEARS
from .residual import has_hooks, is_plain_tensor

_NORMS = (nn.LayerNorm, FusedLayerNorm, nn.RMSNorm, FusedRMSNorm)
# Element by element; nn.PReLU is not among them, whose parameters may belong to positions.
_ELEMENTWISE = (
    nn.Dropout,
    nn.Identity,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)
_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    F.relu,
    torch.relu,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.selu,
    F.celu,
    F.relu6,
    F.leaky_relu,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
    F.logsigmoid,
    F.softplus,
    F.softsign,
    F.sigmoid,
    torch.sigmoid,
    F.tanh,
    torch.tanh,
)


def is_token_wise(part: Any) -> bool:
    """True if calling `part`, a module or function, on packed tokens is as on a padded batch."""
    if not isinstance(part, nn.Module):
        return _is_function(part)
    if has_hooks(part):
        return False
    kind = type(part)
    if kind in _ELEMENTWISE:
        return True
    if kind in LINEARS:
        return _has_plain_parameters(part)
    if kind in _NORMS:
        return len(part.normalized_shape) == 1 and _has_plain_parameters(part)  # type: ignore[arg-type]
    return getattr(part, "token_wise", False) is True


def first_other(owner: nn.Module, names: Iterable[str]) -> str | None:
    """The first of the attributes `names` of `owner` that is not token-wise; None if all are."""
    for name in names:
        if not is_token_wise(getattr(owner, name)):
            return name
    return None


def why_not(name: str, part: Any) -> str:
    """What to tell a user of `part`, called `name`, that is not token-wise."""
    if not isinstance(part, nn.Module):
        called = getattr(part, "__name__", type(part).__name__)
        return f"`{name}` is {called}, which may look across positions"
    if "forward" in part.__dict__:
        return f"`forward` of `{name}` was replaced"
    if has_hooks(part):
        return f"a hook on `{name}`"
    kind = type(part)
    if kind in _NORMS and len(part.normalized_shape) != 1:  # type: ignore[arg-type]
        return f"`{name}` normalizes over {len(part.normalized_shape)} dimensions"  # type: ignore[arg-type]
    if kind in (*LINEARS, *_NORMS):
        return f"`{name}` has parameters of another class than torch's"
    return f"`{name}` is a {kind.__name__}"


def _is_function(part: Any) -> bool:
    if type(part) is functools.partial:
        settings = (*part.args, *part.keywords.values())
        plain = all(isinstance(value, (bool, int, float, str)) for value in settings)
        return plain and _is_function(part.func)
    if any(part is function for function in _FUNCTIONS):
        return True
    return getattr(part, "token_wise", False) is True


def _has_plain_parameters(module: nn.Module) -> bool:
    """False for quantized and sharded parameters, which may scale by what all tokens hold."""
    return is_plain_tensor(module.weight) and is_plain_tensor(getattr(module, "bias", None))
