"""Equal calls are worked out once: from the third on, only their pointers are.

What a backend does with a call follows from shapes, strides, dtypes and options, from which of its
tensors start at multiples of 16 bytes, and from a few settings. The first call of a signature runs
as ever, the second is noted as it runs (`recording.py`), and later ones repeat what was noted
(`tape.py`): lengths that come once cost nothing more. Whatever there is no rule for runs as ever.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from .. import native
from . import device as triton_device
from . import recording
from .tape import Refused, Tape

# Versions of Triton whose way from `JITFunction.run` to the handle of a kernel has been read.
KNOWN_VERSIONS = ((3, 6), (3, 7))
MAX_TAPES = 1024

Tensors = tuple[Any, ...]  # or None in places

_SEEN, _REFUSED = "seen once", "never noted"
_tapes: dict[Hashable, Tape | str] = {}
_paused = 0


def run(function: Callable[..., None], tensors: Tensors, *settings: Hashable) -> None:
    """Call `function(tensors, *settings)`, or repeat what it did with equal ones.

    Args:
        function: writes its results to some of the tensors, and reads nothing but them and
            settings.
        tensors: all on one device, the first of them not None.
    """
    usual = not _paused and triton_device.compiling() is None and _is_known()
    driver = _plain_driver() if usual else None
    if driver is None:
        function(tensors, *settings)
        return
    here, index = driver.get_current_device(), tensors[0].get_device()
    if index not in (here, -1):
        with torch.cuda.device(index):
            run(function, tensors, *settings)
        return
    layouts, pointers = _launch_key()(tensors) or _launch_key_in_python(tensors)
    signature = (function, driver, here, layouts, settings)
    tape = _tapes.get(signature)
    if tape.__class__ is Tape and tape.run(tensors, pointers, driver.get_current_stream(here)):
        return
    if tape is None:
        if len(_tapes) >= MAX_TAPES:
            _tapes.clear()
        _tapes[signature] = _SEEN
    if tape is _SEEN and recording.current() is None:
        _tapes[signature] = _note(function, tensors, settings, driver)
    else:
        function(tensors, *settings)


def _launch_key_in_python(tensors: Tensors) -> tuple[Hashable, Sequence[int]]:
    """As `_C.launch_key`, of tensors of any dtype and number."""
    given = [x is not None and x.numel() > 0 for x in tensors]
    pointers = [x.data_ptr() if there else 0 for x, there in zip(tensors, given, strict=True)]
    layouts = [
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, start % 16)
        for x, start in zip(tensors, pointers, strict=True)
    ]
    return tuple(layouts), pointers


@functools.cache
def _launch_key() -> Callable[[Tensors], tuple[Hashable, Sequence[int]] | None]:
    """What tells apart calls that may launch something else."""
    return native.module().launch_key if native.why_not() is None else _launch_key_in_python


def _note(
    function: Callable[..., None], tensors: Tensors, settings: Any, driver: Any
) -> Tape | str:
    """Run a call and note what it does."""
    nvidia = driver.get_current_target().backend == "cuda"
    if triton_device.capturing():
        function(tensors, *settings)
        return _SEEN
    if torch._C._len_torch_dispatch_stack() or not nvidia:
        function(tensors, *settings)
        return _REFUSED
    # One tensor may be two operands: each has an object of its own here.
    given = [None if tensor is None else tensor.detach() for tensor in tensors]
    with recording.Recording(given) as notes:
        function(tuple(given), *settings)
    try:
        return Tape(notes)
    except Refused:
        return _SEEN if notes.again else _REFUSED


@functools.cache
def _is_known() -> bool:
    """Whether this is a Triton that compiles, of a known version."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not triton_device.interpreted() and version in KNOWN_VERSIONS


def _plain_driver() -> Any:
    """Triton's driver; None where somebody watches or changes what it launches or compiles."""
    runtime, compilation, config = _triton()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A chain of no hooks is there by default.
    if (enter is not None and getattr(enter, "calls", True)) or (
        leave is not None and getattr(leave, "calls", True)
    ):
        return None
    if runtime.debug or runtime.add_stages_inspection_hook or compilation.instrumentation_mode:
        return None
    return config.active


@functools.cache
def _triton() -> tuple[Any, Any, Any]:
    from triton import knobs
    from triton.runtime import driver

    return knobs.runtime, knobs.compilation, driver


def forget() -> None:
    """Work every call out anew: what decided about their launches has changed."""
    _tapes.clear()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Within this, every call runs as ever; afterwards nothing is known of any."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1
        forget()
