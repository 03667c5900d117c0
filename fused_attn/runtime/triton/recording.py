"""What a call does, noted down while it runs as ever: its launches and torch's operators between.

`tape.py` makes of it what runs an equal call again. A call that does anything whose result the
notes cannot tell is refused, and runs as ever each time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Allocations: what they return depends on sizes alone.
_ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_UNKNOWABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Place(NamedTuple):
    """Where a tensor starts: so many bytes after the start of that of a slot."""

    slot: int
    offset: int


class Launch(NamedTuple):
    """A launch; tensors are among its arguments."""

    kernel: Any
    compiled: Any  # Triton's CompiledKernel
    programs: int
    args: tuple[Any, ...]


class Call(NamedTuple):
    """One of torch's operators; tensors are among its arguments."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor


class Allocation(NamedTuple):
    """A new tensor."""

    slot: int
    tensor: Tensor


class Recording(TorchDispatchMode):
    """Within this, everything that a call does is noted."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.given = given
        self.steps: list[Launch | Call | Allocation] = []
        self.refused: str | None = None
        self.again = False  # the next equal call may be noted
        self._places: dict[int, tuple[Place, Tensor]] = {}  # by id; keeps the tensors, and the ids
        self._owners: dict[int, Tensor] = {}
        self.slots = 0
        for tensor in given:
            if tensor is not None:
                self._new_slot(tensor)
            else:
                self.slots += 1

    def __enter__(self) -> Recording:
        _local.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _local.recording = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor starts; None if it came from elsewhere."""
        found = self._places.get(id(tensor))
        return None if found is None else found[0]

    def tensor(self, slot: int) -> Tensor:
        """The tensor of a slot."""
        return self._owners[slot]

    def refuse(self, why: str, again: bool = False) -> None:
        """Say that an equal call may not do the same; `again`: those after it may."""
        self.again = again and (self.again or self.refused is None)
        self.refused = self.refused or why

    def launched(self, kernel: Any, compiled: Any, programs: int, args: tuple[Any, ...]) -> None:
        """Note a launch."""
        self.steps.append(Launch(kernel, compiled, programs, args))

    def _new_slot(self, tensor: Tensor) -> int:
        slot = self.slots
        self.slots += 1
        self._places[id(tensor)] = (Place(slot, 0), tensor)
        self._owners[slot] = tensor
        return slot

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(result, Tensor) or not _UNKNOWABLE.isdisjoint(func.tags):
            self.refuse(f"{func} may come to something else")
        elif func in _ALLOCATE:
            self.steps.append(Allocation(self._new_slot(result), result))
        elif func.is_view:
            self._note_view(args[0], result)
        else:
            if id(result) not in self._places:  # else it was written to
                self._new_slot(result)
            self.steps.append(Call(func, args, kwargs, result))

    def _note_view(self, base: Tensor, view: Tensor) -> None:
        place = self.place(base)
        if place is not None:
            further = view.data_ptr() - base.data_ptr() if view.numel() and base.numel() else 0
            self._places[id(view)] = (place._replace(offset=place.offset + further), view)


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


def current() -> Recording | None:
    """What notes the calls of this thread, if anything does."""
    return _local.recording


def refuse(why: str, again: bool = False) -> None:
    """As `Recording.refuse`, where a call is noted."""
    if _local.recording is not None:
        _local.recording.refuse(why, again)
