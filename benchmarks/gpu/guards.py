"""Memory that tells who wrote past its ends, and whether everything was written.

Within `guarded()` every tensor that is allocated without values lies between two guard bands and
starts as NaN; `fenced` moves an input there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BAND = 1024  # bytes on either side: a multiple of every alignment that a kernel asks for
PATTERN = 0x5A
_ALLOCATORS = ("empty", "empty_like", "empty_permuted")


class Guards:
    """The bands of all tensors allocated so far."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, str]] = []
        self._empty = torch.empty

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """New memory in the shape, strides, dtype and device of `tensor`, between bands."""
        extent = 0 if tensor.numel() == 0 else 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            extent += (size - 1) * stride if tensor.numel() else 0
        # The upper band begins right where the tensor ends.
        size = 2 * BAND + extent * tensor.element_size()
        block = self._empty(size, dtype=torch.uint8, device=tensor.device)
        block.fill_(PATTERN)
        self._blocks.append((block, name))
        offset = BAND // tensor.element_size()
        placed = self._empty(0, dtype=tensor.dtype, device=tensor.device)
        return placed.set_(block.untyped_storage(), offset, tensor.shape, tensor.stride())

    def fenced(self, tensor: Tensor, name: str) -> Tensor:
        """A copy of `tensor`, strides and all, between bands."""
        copy = self.like(tensor, name)
        with torch.no_grad():
            if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
                index = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
                copy[index].copy_(tensor[index])
            else:
                copy.copy_(tensor)
        return copy.requires_grad_(tensor.requires_grad)

    def check(self) -> None:
        """Raise AssertionError naming the tensors whose bands have changed."""
        touched = [
            name
            for block, name in self._blocks
            if bool((block[:BAND] != PATTERN).any() or (block[-BAND:] != PATTERN).any())
        ]
        assert not touched, f"written outside of {', '.join(sorted(set(touched)))}"


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """Guard everything that is allocated meanwhile, and check it at the end."""
    guards = Guards()
    originals = {name: getattr(torch, name) for name in _ALLOCATORS}

    def guarding(name: str) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = originals[name](*args, **kwargs)
            if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.is_meta:
                return tensor
            placed = guards.like(tensor, f"a result of shape {tuple(tensor.shape)}")
            with torch.no_grad():
                placed.fill_(float("nan"))
            return placed.requires_grad_(tensor.requires_grad)

        return allocate

    for name in _ALLOCATORS:
        setattr(torch, name, guarding(name))
    try:
        yield guards
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
    guards.check()
