"""Memory that shows what a kernel does beyond its tensors, and what it leaves unwritten."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ALLOCATORS = ("empty", "empty_like", "empty_permuted")
# The caching allocator gives so much or more in a block of its own, a multiple of SEGMENT.
OWN_BLOCK, SEGMENT = 12 << 20, 2 << 20
_mappings: list[mmap.mmap] = []  # tensors do not keep them


class Skipped(Exception):
    """A case that says nothing here; the message says why."""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within this, what is allocated without values is NaN: what is not written then shows."""
    originals = {name: getattr(torch, name) for name in ALLOCATORS}

    def poisoning(name: str) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = originals[name](*args, **kwargs)
            if type(tensor) is Tensor and tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return allocate

    for name in ALLOCATORS:
        setattr(torch, name, poisoning(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def at_the_end(x: Tensor) -> Tensor:
    """A dense copy of `x` whose last byte is the last before memory that is not there.

    On a CPU the next page is protected. On a GPU the tensor ends where its block does; what comes
    after that is for the driver to say, most often nothing.

    Raises:
        Skipped: this system has no such memory.
    """
    x = x.contiguous()
    size = x.numel() * x.element_size()
    if size == 0:
        return x.clone()
    if x.device.type == "cuda":
        room = -(-max(size, OWN_BLOCK) // SEGMENT) * SEGMENT
        memory = torch.zeros(room, dtype=torch.uint8, device=x.device)[room - size :]
    else:
        memory = torch.frombuffer(_before_a_protected_page(size), dtype=torch.uint8)
    return memory.view(x.dtype).view(x.shape).copy_(x)


def _before_a_protected_page(size: int) -> Any:
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    protect = getattr(ctypes.CDLL(None), "mprotect", None) if hasattr(mmap, "PROT_READ") else None
    if protect is None:
        raise Skipped("this system has no mprotect")
    mapping = mmap.mmap(-1, room + page)
    _mappings.append(mapping)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if protect(ctypes.c_void_p(base + room), ctypes.c_size_t(page), 0) != 0:
        raise Skipped("this system protects no page")
    return (ctypes.c_char * size).from_address(base + room - size)


def slice_with_sentinels(x: Tensor, extra: int = 5) -> tuple[Tensor, Tensor]:
    """(a view like `x` within wider rows, the columns beside it), all of it filled with 7."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), 7.0, dtype=x.dtype, device=x.device)
    return wide[..., : x.shape[-1]], wide[..., x.shape[-1] :]
