"""Every operation, for those who go through all of them: info, tests, suites, warm-up.

A new operation is a folder beside the others and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import attention, bias_activation, embedding, layer_norm, linear
from .attention import api as attention_api
from .attention import call as attention_call
from .attention.sdpa import scaled_dot_product_attention
from .bias_activation import api as bias_activation_api
from .bias_activation import call as bias_activation_call
from .dispatch import PlanCache
from .embedding import api as embedding_api
from .embedding import call as embedding_call
from .layer_norm import api as layer_norm_api
from .layer_norm import call as layer_norm_call
from .linear import api as linear_api
from .linear import call as linear_call


@dataclass(frozen=True)
class Operation:
    """What a folder of `ops` holds.

    Attributes:
        package: the folder; its name is that of the operation, and its operators begin with it.
        operands: the named tuple of a call's tensors.
        plans: what its calls come to; the latest is kept.
        functions: the public functions that are calls of it.
        smallest: (device, dtype) -> the problem of the smallest call.
    """

    package: ModuleType
    operands: type[Any]
    plans: PlanCache[Any]
    functions: tuple[Callable[..., Any], ...]
    smallest: Callable[[torch.device, torch.dtype], Any]

    @property
    def name(self) -> str:
        return self.package.__name__.rpartition(".")[2]

    @property
    def backends(self) -> tuple[Any, ...]:
        """In order of preference."""
        return self.package.BACKENDS


def is_operation(function: Callable[..., Any]) -> bool:
    """Whether a function is a call of one operation."""
    return any(function in operation.functions for operation in OPERATIONS)


def operation_of(function: Callable[..., Any]) -> Operation:
    """The operation that a public function is a call of.

    Raises:
        TypeError: it is none of them.
    """
    for operation in OPERATIONS:
        if function in operation.functions:
            return operation
    known = ", ".join(f.__name__ for operation in OPERATIONS for f in operation.functions)
    raise TypeError(f"`function` must be one of {known}, got {function!r}")


OPERATIONS = (
    Operation(
        attention,
        attention_call.Operands,
        attention_call.plans,
        (attention_api.attention, attention_api.attention_varlen, scaled_dot_product_attention),
        attention_call.smallest,
    ),
    Operation(
        layer_norm,
        layer_norm_call.Operands,
        layer_norm_call.plans,
        (
            layer_norm_api.layer_norm,
            layer_norm_api.rms_norm,
            layer_norm_api.add_layer_norm,
            layer_norm_api.add_rms_norm,
        ),
        layer_norm_call.smallest,
    ),
    Operation(
        bias_activation,
        bias_activation_call.Operands,
        bias_activation_call.plans,
        (bias_activation_api.bias_activation,),
        bias_activation_call.smallest,
    ),
    Operation(
        embedding,
        embedding_call.Operands,
        embedding_call.plans,
        (embedding_api.embedding,),
        embedding_call.smallest,
    ),
    Operation(
        linear,
        linear_call.Operands,
        linear_call.plans,
        (linear_api.linear,),
        linear_call.smallest,
    ),
)
