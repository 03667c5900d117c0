"""Do two tensors share memory? What is written must not be what is still to be read.

Two strided tensors share an element where a sum of strides, each taken a bounded number of times,
makes up the distance between their first elements. That is a bounded linear Diophantine equation.
Strides of real tensors are nested, so that a search from the largest stride down has one or two
ways to go at each level.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_MOST_STEPS = 20_000  # of the search; beyond, the tensors count as overlapping

Term = tuple[int, int, int]  # a stride in bytes, and how often it may be taken: from, to


def expect_writable(name: str, out: Tensor) -> None:
    """Refuse an `out` in which several elements lie in one place.

    Raises:
        ValueError: it is so, as in what `expand` gives.
    """
    if not _has_memory(out) or not _overlaps_itself(out):
        return
    raise ValueError(
        f"`{name}` must have a place in memory for each element, got strides {out.stride()} for "
        f"shape {tuple(out.shape)}"
    )


def expect_apart(name: str, out: Tensor, operands: Any, in_place: Iterable[str] = ()) -> None:
    """Refuse an `out` that shares memory with an operand of the call.

    Args:
        operands: the named tuple of the call.
        in_place: operands that `out` may be, all of it, with the same shape, strides and dtype.

    Raises:
        ValueError: it shares memory in another way.
    """
    allowed = frozenset(in_place)
    for field, operand in zip(operands._fields, operands, strict=True):
        if not isinstance(operand, Tensor) or not share_memory(out, operand):
            continue
        if field in allowed and is_same(out, operand):
            continue
        how = f"be `{field}` itself or " if field in allowed else ""
        raise ValueError(f"`{name}` must {how}share no memory with `{field}`, got tensors that do")


def share_memory(a: Tensor, b: Tensor) -> bool:
    """True if an element of `a` and one of `b` have a byte in common (or the search gives up)."""
    if not (_has_memory(a) and _has_memory(b)) or a.device != b.device:
        return False
    if a.numel() == 0 or b.numel() == 0:
        return False
    distance = b.data_ptr() - a.data_ptr()
    # An element of `a` at x, one of `b` at distance + y; a byte in common: -size_a < y - x < size_b
    terms = [(s * a.element_size(), 0, n - 1) for s, n in zip(a.stride(), a.shape, strict=True)]
    terms += [(s * b.element_size(), 1 - n, 0) for s, n in zip(b.stride(), b.shape, strict=True)]
    return _reaches(terms, distance - a.element_size() + 1, distance + b.element_size() - 1)


def _overlaps_itself(tensor: Tensor) -> bool:
    """True if two elements lie in one place."""
    if tensor.numel() <= 1:
        return False
    size = tensor.element_size()
    terms = [(s * size, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    terms.sort(reverse=True)
    # Nested strides: each is beyond all that the smaller ones reach.
    reach = 0
    for stride, count in reversed(terms):
        if stride <= reach:
            break
        reach += stride * (count - 1)
    else:
        return False
    # Two elements in one place differ in a first dimension by some step > 0, in the later ones by
    # any, and make up 0.
    for i, (stride, count) in enumerate(terms):
        later = [(s, 1 - n, n - 1) for s, n in terms[i + 1 :]]
        if _reaches([(stride, 1, count - 1), *later], 1 - size, size - 1):
            return True
    return False


def _reaches(terms: list[Term], low: int, high: int) -> bool:
    """True if some sum of the terms lies in [low, high]."""
    joined: dict[int, tuple[int, int]] = {}
    for stride, least, most in terms:
        if least == most == 0 or stride == 0:
            continue
        before = joined.get(stride, (0, 0))
        joined[stride] = (before[0] + least, before[1] + most)
    ordered = sorted(((s, a, b) for s, (a, b) in joined.items()), reverse=True)
    least_left = [sum(s * a for s, a, _ in ordered[i:]) for i in range(len(ordered) + 1)]
    most_left = [sum(s * b for s, _, b in ordered[i:]) for i in range(len(ordered) + 1)]
    steps = 0
    pending = [(0, low, high)]
    while pending:
        level, low, high = pending.pop()
        if high < least_left[level] or low > most_left[level]:
            continue
        if level == len(ordered):
            return True
        steps += 1
        if steps > _MOST_STEPS:
            return True
        stride, least, most = ordered[level]
        first = max(least, -((most_left[level + 1] - low) // stride))
        last = min(most, (high - least_left[level + 1]) // stride)
        if last - first > _MOST_STEPS:
            return True
        for n in range(first, last + 1):
            pending.append((level + 1, low - stride * n, high - stride * n))
    return False


def is_same(a: Tensor, b: Tensor) -> bool:
    """True if both are the very same elements of memory, in the same order."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _has_memory(tensor: Tensor) -> bool:
    """False for tensors of a compiler, fake ones and other subclasses: they have no address."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not is_compiling() and tensor.layout == torch.strided and not tensor.is_meta
