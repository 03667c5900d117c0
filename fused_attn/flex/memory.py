"""What backends keep for calls of one mask: a memory for each signature of it.

The signature is what the mask depends on: the function that was read (its code, and the numbers
around it), what it captured, object by object with the version that in-place changes count, the
lists of blocks, the lengths, batch elements and heads, and the device. Where one of these is
another, so is the memory. Writes that torch does not count (through `.data` or another library)
do not show: as for autograd.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .call import Call

_MOST = 32  # signatures
_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


@dataclass(frozen=True)
class _Kept:
    """A memory, and what its key names by number: alive as long as it, or seen to be dead."""

    nodes: Any
    tensors: list[weakref.ref[Tensor]]
    identities: list[Hashable]
    memory: dict[Hashable, Any] = field(default_factory=dict)

    def is_stale(self) -> bool:
        """Whether one of the tensors is no more, or no more what it was."""
        tensors = zip(self.tensors, self.identities, strict=True)
        return any((x := ref()) is None or _identity(x) != identity for ref, identity in tensors)


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
_lock = threading.Lock()  # the backward has a thread of its own


def memory_of(call: Call, q: Tensor, k: Tensor) -> dict[Hashable, Any]:
    """The memory of the call's mask; an empty one of its own where nothing can be kept."""
    nodes = None if call.mask is None else call.mask.nodes
    tensors = [] if call.mask is None else list(call.mask.captured)
    listed = [getattr(call.block_mask, name, None) for name in _LISTS]
    tensors += [x for x in listed if x is not None]
    queue = _queue(q.device)
    if queue is None or any(x.is_inference() for x in tensors):  # which count no changes
        return {}
    sizes = (*q.shape[:3], k.shape[2], *getattr(call.block_mask, "BLOCK_SIZE", ()))
    identities = [_identity(x) for x in tensors]
    key = (id(nodes), *identities, *(x is None for x in listed), sizes, q.device, queue)
    with _lock:
        found = _kept.get(key)
        if found is None or found.is_stale():
            found = _Kept(nodes, [weakref.ref(x) for x in tensors], identities)
            _kept[key] = found
            _forget()
        _kept.move_to_end(key)
    return found.memory


def _queue(device: torch.device) -> Hashable | None:
    """What orders the work of a device; None where it is recorded, to run on other numbers."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


def _identity(tensor: Tensor) -> Hashable:
    """The object, its place, and how often it was changed in place."""
    return id(tensor), tensor.data_ptr(), tensor._version


def _forget() -> None:
    """Drop what is stale, and then what was not used for longest."""
    for key in [key for key, one in _kept.items() if one.is_stale()]:
        del _kept[key]
    while len(_kept) > _MOST:
        _kept.popitem(last=False)
