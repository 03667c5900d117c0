"""A compiled kernel of Triton's, launched without the way through `JITFunction.run`.

Everything here that is not public is of Triton 3.6 and 3.7 (`replay.KNOWN_VERSIONS`), whose own
launcher is called with what it would be called with; where something looks otherwise, the next
layer above it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_MAX_MAPS = 64  # of one descriptor
# What `wrap_handle_tensordesc` holds: it encodes the descriptors among the arguments.
_WRAPPER = ("launcher", "tensordesc_indices", "tensordesc_meta")
_HOOKS, _SCRATCH = (None, None, None), (None, None)  # and what hooks would be told

Start = Callable[[int, int, tuple[Any, ...]], None]  # programs, stream, arguments
Arguments = Callable[[int, Tensor], tuple[Any, ...]]  # where a tensor starts, and itself


class Handle:
    """What launches a compiled kernel, and what descriptors are among its arguments."""

    def __init__(self, compiled: Any) -> None:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._metadata: list[Any] | None = None  # of each descriptor, if they are encoded here
        if not _is_known_launcher(run):
            rest: tuple[Any, ...] = (metadata, *_HOOKS)
            self.start: Start = lambda programs, stream, args: run(
                programs, 1, 1, stream, function, *rest, *args
            )
            return
        launch, self._metadata = _without_wrapper(run.launch)
        flags = (run.launch_cooperative_grid, run.launch_pdl)
        if hasattr(run, "kernel_signature"):  # from 3.7 on: one function for all signatures
            signature = (run.arg_annotations, run.kernel_signature)
            rest = (*flags, metadata, *_HOOKS, *_SCRATCH, *signature)
            self.start = lambda programs, stream, args: launch(
                programs, 1, 1, stream, function, *rest, args
            )
        else:
            rest = (*flags, *_SCRATCH, metadata, *_HOOKS)
            self.start = lambda programs, stream, args: launch(
                programs, 1, 1, stream, function, *rest, *args
            )

    def arguments_of(self, descriptor: Any, number: int) -> Arguments:
        """What stands for a descriptor in a launch.

        Args:
            descriptor: what it is like but for its tensor, which is not kept.
            number: which of the kernel's descriptors.
        """
        attributes = {name: part for name, part in vars(descriptor).items() if name != "base"}
        if self._metadata is None:
            return lambda pointer, base: (_Descriptor(attributes, base),)
        return _Maps(attributes, self._metadata[number])


def _is_known_launcher(run: Any) -> bool:
    """Whether it is Triton's own for NVIDIA, which would only add that there is no scratch."""
    from triton.backends.nvidia.driver import CudaLauncher

    return type(run) is CudaLauncher and not (run.global_scratch_size or run.profile_scratch_size)


def _without_wrapper(launch: Any) -> tuple[Any, list[Any] | None]:
    """(launcher, how it wants each descriptor), without the wrapper that encodes them each time."""
    code = getattr(launch, "__code__", None)
    if code is None or code.co_freevars != _WRAPPER:
        return launch, None
    launcher, _, metadata = (cell.cell_contents for cell in launch.__closure__)
    if any(each is None for each in metadata):  # no tensor maps: the tensor itself is passed
        return launch, None
    return launcher, list(metadata)


class _Descriptor:
    """As much of a TensorDescriptor as Triton's launcher reads."""

    def __init__(self, attributes: dict[str, Any], base: Tensor) -> None:
        self.__dict__.update(attributes, base=base)


class _Maps:
    """The tensor map, sizes and strides of a descriptor, by where its tensor starts."""

    def __init__(self, attributes: dict[str, Any], metadata: Any) -> None:
        self._attributes, self._metadata = attributes, metadata
        self._known: dict[int, tuple[Any, ...]] = {}

    def __call__(self, pointer: int, base: Tensor) -> tuple[Any, ...]:
        known = self._known.get(pointer)
        if known is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            if len(self._known) >= _MAX_MAPS:
                self._known.clear()
            descriptor = _Descriptor(self._attributes, base)
            known = tuple(make_tensordesc_arg(descriptor, self._metadata))
            self._known[pointer] = known
        return known
