"""A call run again: its launches with other pointers, nothing else looked at.

Triton compiles a kernel for the dtypes of its tensors, for which of them start at multiples of 16
bytes, for what is None, and for some numbers. All of that is in the signature of a call
(`replay.py`), so that an equal call launches the same compiled kernels with the same numbers, and
the handle of each can be called without Triton's binder. What is passed is what `JITFunction.run`
would pass, but for tensors, in whose place their addresses come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .handle import Handle
from .recording import Allocation, Call, Launch, Place, Recording

_ALIGNMENT = 512  # of torch's allocations on a GPU, and of the pieces of one that stands for many
_DENSE = torch.contiguous_format

Slots = list[Any]  # the tensors of a call, by number
Pointers = list[int]  # where they start
Step = Callable[[Slots, Pointers, int], None]


class Refused(Exception):
    """A call that cannot be run again from its notes."""


class Tape:
    """What runs a call again. It holds no tensor of the one that was noted."""

    def __init__(self, recording: Recording) -> None:
        if recording.refused is not None:
            raise Refused(recording.refused)
        self._notes = recording
        self._given = len(recording.given)
        launched = [step.kernel for step in recording.steps if isinstance(step, Launch)]
        self._kernels = tuple(dict.fromkeys(launched))
        called = self._slots_of_calls()
        self._pieces: list[tuple[int, int]] = []  # (slot, offset) of what is allocated as one
        self._extra = recording.slots - self._given
        size, device = 0, None
        steps: list[Step] = []
        for step in recording.steps:
            if isinstance(step, Allocation):
                if step.tensor.data_ptr() % 16:
                    raise Refused("torch allocates at no multiple of 16 bytes here")
                if step.slot in called or not step.tensor.is_contiguous():
                    steps.append(self._allocate(step))
                    continue
                device = step.tensor.device
                self._pieces.append((step.slot, size))
                size += -(-step.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            elif isinstance(step, Launch):
                steps.append(self._launch(step))
            else:
                steps.append(self._call(step))
        self._steps = tuple(steps)
        self._scratch = None
        if size:  # one number, repeated: `empty_like` is faster than `empty`
            self._scratch = torch.empty((), dtype=torch.uint8, device=device).expand(size)
        del self._notes

    def run(self, tensors: Sequence[Tensor | None], pointers: Sequence[int], stream: int) -> bool:
        """Run the call with these tensors, which start there; False if nothing was done."""
        for kernel in self._kernels:
            if kernel.pre_run_hooks:  # somebody wants to see the tensors
                return False
        slots: Any = tensors
        starts: Any = pointers
        if self._extra:
            slots = [*tensors, *[None] * self._extra]
            starts = [*pointers, *[0] * self._extra]
            if self._scratch is not None:
                scratch = torch.empty_like(self._scratch, memory_format=_DENSE)
                start = scratch.data_ptr()
                if start % 16:
                    return False
                for slot, offset in self._pieces:
                    starts[slot] = start + offset
        for step in self._steps:
            step(slots, starts, stream)
        return True

    def _slots_of_calls(self) -> set[int]:
        """Slots that torch's operators read or write: they must be tensors."""
        found: set[int] = set()
        for step in self._notes.steps:
            if isinstance(step, Call):
                for tensor in _tensors((step.args, tuple(step.kwargs.values()), step.result)):
                    found.add(self._place(tensor).slot)
        return found

    def _place(self, tensor: Tensor) -> Place:
        place = self._notes.place(tensor)
        if place is None:
            raise Refused("a tensor of a launch came from elsewhere")
        return place

    def _allocate(self, step: Allocation) -> Step:
        slot, tensor = step.slot, step.tensor
        if not tensor.is_contiguous():
            raise Refused("a temporary tensor is not dense")
        like = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

        def allocate(slots: Slots, pointers: Pointers, stream: int) -> None:
            new = slots[slot] = torch.empty_like(like, memory_format=_DENSE)
            pointers[slot] = new.data_ptr()

        return allocate

    def _launch(self, step: Launch) -> Step:
        kernel, compiled, programs, given = step
        if compiled is None:
            raise Refused("Triton does not say what ran")
        bound = kernel.signature.bind(*given)
        bound.apply_defaults()
        handle, constants = Handle(compiled), dict[str, Any]()
        texts = [self._text(value, constants, handle) for value in bound.arguments.values()]
        arguments = eval(f"lambda p, t: ({' '.join(text + ',' for text in texts)})", constants)
        start = handle.start

        def launch(slots: Slots, pointers: Pointers, stream: int) -> None:
            start(programs, stream, arguments(pointers, slots))

        return launch

    def _text(self, value: Any, constants: dict[str, Any], handle: Handle) -> str:
        """An expression for an argument, where `p` are the pointers and `t` the tensors."""
        if isinstance(value, Tensor):
            slot, offset = self._place(value)
            if value.numel() == 0:  # its address says nothing
                raise Refused("an empty tensor is among the arguments")
            return f"p[{slot}] + {offset}" if offset else f"p[{slot}]"
        if isinstance(value, tuple) and any(True for _ in _tensors(value)):
            return f"({' '.join(self._text(part, constants, handle) + ',' for part in value)})"
        base = getattr(value, "base", None)
        if isinstance(base, Tensor):
            slot, offset = self._place(base)
            if offset or slot >= self._given:
                raise Refused("a descriptor is not of a given tensor")
            number = sum(name.startswith("d") for name in constants)
            constants[f"d{number}"] = handle.arguments_of(value, number)
            return f"*d{number}(p[{slot}], t[{slot}])"
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def _call(self, step: Call) -> Step:
        operator, args, kwargs, result = step
        result_slot = self._place(result).slot
        makers = [self._maker(value) for value in args]
        named = {name: self._maker(value) for name, value in kwargs.items()}

        def call(slots: Slots, pointers: Pointers, stream: int) -> None:
            made = operator(
                *[make(slots) for make in makers], **{k: make(slots) for k, make in named.items()}
            )
            if slots[result_slot] is None:
                slots[result_slot], pointers[result_slot] = made, made.data_ptr()

        return call

    def _maker(self, value: Any) -> Callable[[Slots], Any]:
        """What makes an argument of one of torch's operators."""
        if isinstance(value, (tuple, list)) and any(True for _ in _tensors(value)):
            makers, kind = [self._maker(part) for part in value], type(value)
            return lambda slots: kind([make(slots) for make in makers])
        if not isinstance(value, Tensor):
            return lambda slots: value
        place = self._place(value)
        slot, base = place.slot, self._notes.tensor(place.slot)
        if value.dtype != base.dtype or value.device != base.device:
            raise Refused("an operator reads other bytes than its tensor has")
        if (value.shape, value.stride(), place.offset) == (base.shape, base.stride(), 0):
            return lambda slots: slots[slot]
        shape, stride, further = value.shape, value.stride(), place.offset // value.element_size()
        return lambda slots: slots[slot].as_strided(
            shape, stride, slots[slot].storage_offset() + further
        )


def _tensors(value: Any) -> Any:
    """All tensors in nested tuples and lists, those of descriptors included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(getattr(value, "base", None), Tensor):
        yield value.base
