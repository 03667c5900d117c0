"""Objects that are tensors by class: which of them are understood, and which are refused by name.

One rule for every operation. Understood are torch's own tensors, subclasses that change nothing of
how torch's functions treat them (their memory is theirs), and subclasses that have a
`__torch_dispatch__` (DTensor, FakeTensor, nested and functional tensors): those see the operators
and decide themselves; DTensor must be told how, by a door that is loaded for the first one. torch's
`CausalBias` has no memory to read; it is a word for a mask, and taken as that. Whatever else has
rules of its own would be read as plain memory: it is refused.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_understood(tensor: Tensor) -> bool:
    """True for what an operation may take."""
    kind = type(tensor)
    if kind in _PLAIN or is_compiling():
        return True
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    own = kind.__torch_function__
    inherited = (Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)
    return any(getattr(own, "__func__", own) is getattr(f, "__func__", f) for f in inherited)


def is_causal_bias(tensor: Any) -> bool:
    """True for what torch.nn.attention.bias makes: `causal_upper_left`, `causal_lower_right`."""
    bias = sys.modules.get("torch.nn.attention.bias")  # who has one has loaded it
    return bias is not None and isinstance(tensor, bias.CausalBias)


def split_causal_bias(
    name: str, tensor: Any, causal: Any, lengths: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Any]:
    """What a `CausalBias` says, as a mask and `causal` of `attention`.

    Args:
        name, tensor: the argument.
        causal: of the same call; both hold.
        lengths: (Lq, Lk) of the call.

    Returns:
        A bool mask (Lq, Lk), True = visible, or None; and `causal`.

    Raises:
        ValueError: the object is for other lengths.
    """
    variant = tensor.variant.name.lower()
    mine = (tensor.seq_len_q, tensor.seq_len_kv)
    if mine != lengths and variant == "lower_right":  # the other one's torch does not ask for
        raise ValueError(f"`{name}` must be for lengths (Lq, Lk) = {lengths}, got {mine}")
    if causal is False:
        return None, variant
    if causal == variant or (causal is True and variant == "upper_left"):
        return None, causal
    at = lengths[1] - lengths[0] if variant == "lower_right" else 0
    return torch.ones(lengths, dtype=torch.bool, device=device).tril(at), causal


# Who knows what DTensor must be told; by name, since nothing inside imports a door.
_DOOR_OF_DTENSORS = "fused_attn.integrations.distributed.dtensors"


def door_of(tensors: Iterable[Any]) -> ModuleType | None:
    """The door for sharded tensors, where there is one among `tensors`."""
    sharded = sys.modules.get("torch.distributed.tensor")  # who has one has loaded it
    if sharded is None or not any(isinstance(x, sharded.DTensor) for x in tensors):
        return None
    return importlib.import_module(_DOOR_OF_DTENSORS)


def understand(operands: Iterable[Any]) -> None:
    """Before an operator sees `operands`: whoever decides for them knows it, and finds no mixture.

    Raises:
        TypeError: DTensors came together with plain tensors.
    """
    operands = operands if isinstance(operands, tuple) else tuple(operands)
    door = door_of(operands)
    if door is not None:
        door.understand(operands)


def replicated_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which is not sharded, beside `like`, which may be: one for all ranks then."""
    door = None if type(like) in _PLAIN else door_of((like,))
    return tensor if door is None else door.replicated_like(tensor, like)
