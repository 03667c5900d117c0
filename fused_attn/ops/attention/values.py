"""Checks of lengths by their values, where to read them costs nothing: in memory of the CPU.

On another device a value would have to be fetched, and the queue to it would run dry: there lengths
out of range are clamped by the kernels, which never leave the tensors.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .problem import Operands, Options


def check(operands: Operands, options: Options) -> None:
    """Refuse `key_lengths`, `prefix_lengths` and `cu_seqlens` that no batch has.

    Raises:
        ValueError: a value is out of range; the message names it.
    """
    for name in ("key_lengths", "prefix_lengths"):
        lengths = getattr(operands, name)
        if lengths is not None and _is_readable(lengths):
            _check_lengths(name, lengths, options.max_seqlen_k)
    for name, rows, most in (
        ("cu_seqlens_q", operands.q.shape[2], options.max_seqlen_q),
        ("cu_seqlens_k", operands.k.shape[2], options.max_seqlen_k),
    ):
        starts = getattr(operands, name)
        if starts is not None and _is_readable(starts):
            _check_starts(name, starts.tolist(), rows, most)


def _is_readable(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or dispatch.is_traced() or not dispatch.is_plain((tensor,)):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _check_lengths(name: str, lengths: Tensor, seqlen_k: int) -> None:
    for number, length in enumerate(lengths.tolist()):
        if not 0 <= length <= seqlen_k:
            raise ValueError(
                f"`{name}` must be in [0, Lk] = [0, {seqlen_k}], got {length} for batch "
                f"element {number}"
            )


def _check_starts(name: str, starts: list[Any], rows: int, most: int) -> None:
    if starts[0] != 0:
        raise ValueError(f"`{name}` must start at 0, got {starts[0]}")
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        if not 0 <= end - start <= most:
            raise ValueError(
                f"`{name}` must rise by 0 to {most} (the maximum length), got {end - start} for "
                f"sequence {number}"
            )
    if starts[-1] > rows:
        raise ValueError(
            f"`{name}` must end within the {rows} rows of the tensor, got {starts[-1]}"
        )
