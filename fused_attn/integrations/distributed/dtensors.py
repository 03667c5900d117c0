"""DTensors: torch's own sharded tensors run our operators, each rank on its part.

Loaded by name when the first DTensor comes in (`runtime.subclasses`), or by hand.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from ...ops.operations import OPERATIONS
from . import flex
from .rules import RULES, Rule

TORCHS_CONTEXT = "torch.distributed.tensor.experimental._context_parallel._attention"


@functools.cache
def register() -> None:
    """Tell DTensor how every operator may be cut up; again does nothing."""
    for operation in OPERATIONS:
        for way in ("forward", "backward"):
            operator = getattr(torch.ops.fused_attn, f"{operation.name}_{way}").default
            register_sharding(operator)(_sharding(operator, RULES[operation.name]))
            # `register_sharding` lets DTensor remember what it decided by the tensors and by what
            # follows the first integer alone: flags before it decide too, and absent operands.
            propagator = DTensor._op_dispatcher.sharding_propagator
            propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(0, needs_pytree=True)


def _sharding(operator: Any, rule: Rule) -> Any:
    """`rule` as `register_sharding` wants it: lists, in the order of the schema."""
    names = [argument.name for argument in operator._schema.arguments]
    results = [result.name for result in operator._schema.returns]

    def acceptable(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        call = dict(zip(names, args, strict=True))
        return [
            (
                [found.get(name, Replicate()) for name in results],
                [
                    found.get(name, Replicate()) if hasattr(value, "placements") else None
                    for name, value in call.items()
                ],
            )
            for found in itertools.chain([{}], rule(call))
        ]

    return acceptable


def understand(operands: tuple[Any, ...]) -> None:
    """What must be so before an operator sees these tensors, one of which is a DTensor.

    Raises:
        TypeError: some are DTensors and others are not; the message says which.
    """
    register()
    _refuse_reordered(operands)
    names = getattr(operands, "_fields", None) or [f"operand {i}" for i, _ in enumerate(operands)]
    tensors = dict(zip(names, operands, strict=True))
    plain = [
        name for name, x in tensors.items() if isinstance(x, Tensor) and type(x) is not DTensor
    ]
    first = next((name for name, x in tensors.items() if isinstance(x, DTensor)), None)
    if first is not None and plain:
        mesh = tensors[first].device_mesh
        raise TypeError(
            f"`{plain[0]}` must be a DTensor as `{first}` is, got a plain tensor\n"
            f"hint: `DTensor.from_local({plain[0]}, mesh)` where every rank has all of it, with "
            f"mesh = {first}.device_mesh = {mesh}"
        )


def _refuse_reordered(operands: tuple[Any, ...]) -> None:
    """Refuse a sequence that torch's context parallelism cut up in an order of its own.

    DTensor would put it together as it lies, and causal masks would count wrong positions.
    """
    theirs = sys.modules.get(TORCHS_CONTEXT)
    q = getattr(operands, "q", None)
    if theirs is None or not isinstance(q, DTensor) or not theirs._cp_options.enable_load_balance:
        return
    handlers = DTensor._op_dispatcher._custom_op_handlers.values()
    if theirs._sdpa_handler in handlers and Shard(2) in q.placements:
        raise NotImplementedError(
            "`q` must not be cut up along the sequence in torch's balanced order, which DTensor "
            "does not know\nhint: `fused_attn.integrations.distributed.context_parallel`, on "
            "`q.to_local()`"
        )


def flex_attention(run: Any, tensors: tuple[Any, Any, Any], score_mod: Any, block_mask: Any) -> Any:
    """`flex_attention` of DTensors; as `flex.attend`."""
    return flex.attend(run, tensors, score_mod, block_mask)


def replicated_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` as one DTensor for the whole mesh of `like`: the first rank's, sent to all."""
    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=True)
