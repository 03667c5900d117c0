"""A program of instructions (`csrc/attention/functions.h`) as it is given to the kernels."""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ....runtime import native


@dataclass(frozen=True)
class Instruction:
    """One row: what it does, the register it gives, its arguments' and the leaf it loads."""

    operation: str
    out: int
    args: tuple[int, ...]
    leaf: int
    value: float


@dataclass(frozen=True)
class Leaf:
    """What code has to know of a vector or a table before it runs.

    Attributes:
        dtype: of its numbers, as torch names it.
        dims: dimensions of a table.
        narrow: places in it, and in its gradient, are numbers of 32 bits.
    """

    dtype: str
    dims: int
    narrow: bool


@dataclass(frozen=True)
class Program:
    """The instructions by stages: once a head, once a block of queries, for every pair."""

    stages: tuple[list[Instruction], list[Instruction], list[Instruction]]
    result: int
    slope: int


def read(rows: Tensor) -> Program:
    """Of a tensor (1 + instructions, 8) int64 as the kernels take it."""
    names = native.module().PAIR_OPERATIONS
    data = bytes_of(rows)
    per_block, per_tile, _, _, result, slope, _, _ = struct.unpack_from("8q", data)
    every = []
    for at in range(64, len(data), 64):
        code, out, *args, leaf, value = struct.unpack_from("7qd", data, at)
        every.append(Instruction(names[code], out, tuple(args), leaf, value))
    stages = (every[:per_block], every[per_block:per_tile], every[per_tile:])
    return Program(stages, result, slope)


def bytes_of(rows: Tensor) -> bytes:
    """The same as text for a key; numpy may not be there."""
    return ctypes.string_at(rows.data_ptr(), rows.numel() * 8)


def leaf_of(tensor: Tensor, gradient: Tensor | None) -> Leaf:
    """What code has to know of a leaf."""
    narrow = _is_narrow(tensor) and (gradient is None or _is_narrow(gradient))
    return Leaf(_name_of(tensor.dtype), tensor.dim(), narrow)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_narrow(tensor: Tensor) -> bool:
    """No place in it, and none of its sizes, is beyond 31 bits."""
    most = max(tensor.shape, default=0)
    return most < 2**31 and tensor.untyped_storage().nbytes() < 2**31
