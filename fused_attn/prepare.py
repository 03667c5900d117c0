"""Getting kernels ready ahead of the first call: compiling, and choosing tiles by time."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .ops import dispatch
from .ops.attention.api import attention
from .runtime.triton import device as triton_device
from .runtime.triton import tuning

_logger = logging.getLogger(__name__)


def warmup(
    *arguments: Any, arch: int | str | None = None, **keyword_arguments: Any
) -> dict[str, float]:
    """Compile the kernels of a call, forward and backward, so that the first one is quick.

    `warmup(q, k, v, ...)` is for `attention(q, k, v, ...)`; any other function of this package
    comes first::

        warmup(q, k, v, causal=True)                               # decoding too, with a short q
        warmup(q, k, v, bias=bias, return_weights="average")
        warmup(fused_attn.add_layer_norm, x, residual, (512,), weight, bias)
        warmup(fused_attn.bias_activation, h, bias, activation="gelu")

    Runs nothing of ours on the device. The backward is compiled too where an argument requires a
    gradient. Kernels go by dtypes, head sizes, strides' divisibility by 16 and which operands there
    are, not by lengths: one call of each kind is enough. What Triton compiled before is read from
    its cache on disk (TRITON_CACHE_DIR). Backends that compile nothing at run time have nothing to
    do here.

    Args:
        arguments, keyword_arguments: as for the function; the values of tensors do not matter.
        arch: compile for this compute capability, 90 for 9.0 (or "gfx942", as AMD names it), on a
            machine without such a GPU or without any: what comes out lies in Triton's cache, for a
            machine with the same Triton.
            Only the sizes, dtypes, strides of the arguments matter then, not where they are; for
            kernels of the default tiles.

    Returns:
        Seconds by kernel; empty if the backend that would run the call compiles nothing.

    Raises:
        TypeError, ValueError, UnsupportedError: as the function.
        RuntimeError: `arch` is given where Triton compiles nothing: it is in its interpreter.
    """
    function: Callable[..., Any] = attention
    if arguments and not isinstance(arguments[0], Tensor) and callable(arguments[0]):
        function, *arguments = arguments  # type: ignore[assignment]
    if arch is not None:
        arguments, keyword_arguments = _for_nobody(arch, arguments, keyword_arguments)
    seconds: dict[str, float] = {}

    def compile_and_time(wanted: triton_device.Wanted) -> None:
        start = time.perf_counter()
        wanted.compile()
        seconds[wanted.kernel] = seconds.get(wanted.kernel, 0.0) + time.perf_counter() - start

    candidate = None if arch is None else 0
    with triton_device.compiling_for(arch, compile_and_time, candidate):
        result = function(*arguments, **keyword_arguments)
        given = pytree.tree_leaves((arguments, keyword_arguments))
        _run_backward(pytree.tree_leaves(result), given)
    if arch is not None:
        dispatch.forget_plans()  # some say that tensors without a device can be run
    total = sum(seconds.values())
    _logger.info("compiled %d kernels in %.2f s: %s", len(seconds), total, ", ".join(seconds))
    return seconds


def _run_backward(results: Iterable[Any], given: Iterable[Any]) -> None:
    outputs = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    inputs = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        grads = [torch.zeros_like(x) for x in outputs]
        torch.autograd.grad(outputs, inputs, grads, allow_unused=True)


def _for_nobody(arch: int | str, *arguments: Any) -> Any:
    """The arguments with tensors that have no memory, and `backend` as nothing else would do."""
    if triton_device.interpreted():
        raise RuntimeError(f"arch={arch} cannot be compiled for: TRITON_INTERPRET is set")

    def without_memory(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shell = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return shell.requires_grad_(x.requires_grad)

    positional, keywords = pytree.tree_map(without_memory, arguments)
    return positional, {**keywords, "backend": triton_device.BACKEND}


def autotune(
    q: Tensor, k: Tensor, v: Tensor, *, timer: tuning.Timer | None = None, **arguments: Any
) -> dict[str, tuning.Trial]:
    """Try the tiles that are shipped for `attention(q, k, v, **arguments)` and keep the fastest.

    Runs the call, and its backward where q, k, v or a bias requires a gradient. Later calls of the
    same class use what was found, in this process and, through the file, in others. A class is made
    of head size, dtype, band (causal or window) and how many of the operands there are that make
    registers scarce; lengths do not matter to it, so take typical ones. Results change by rounding
    where the choice does.

    Args:
        q, k, v, arguments: as for `attention`; the values do not matter.
        timer: takes a function that launches a kernel, returns the milliseconds of one launch; by
            default the median of 20 launches between events on the device.

    Returns:
        What was tried, by kernel and class; empty if the backend has no choice.

    Raises:
        RuntimeError: a CUDA graph is being captured.
        TypeError, ValueError, UnsupportedError: as `attention`.
    """
    if tuning.capturing():
        raise RuntimeError("autotune cannot time kernels while a CUDA graph is being captured")
    with tuning.trying(timer, again=True) as found:
        result = attention(q, k, v, **arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = tuple(x for x in outputs if x.requires_grad)
        inputs = [x for x in (q, k, v, arguments.get("bias")) if x is not None and x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs])
    return found


@contextlib.contextmanager
def autotuning(timer: tuning.Timer | None = None) -> Iterator[dict[str, tuning.Trial]]:
    """Within this, every call tries the candidates of classes that nothing is known about yet.

    For a whole model: `with fused_attn.autotuning(): loss(model(x)).backward()`. Calls that a CUDA
    graph captures are not tried. FUSED_ATTN_TUNING=on does the same for the whole process.

    Args:
        timer: as for `autotune`.

    Yields:
        What has been tried, by kernel and class.
    """
    with tuning.trying(timer, again=False) as found:
        yield found
