"""Compiling ahead of the first call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import dispatch, triton_runtime
from .functional import attention

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

    def compile_and_time(wanted: triton_runtime.Wanted) -> None:
        start = time.perf_counter()
        wanted.compile()
        seconds[wanted.kernel] = seconds.get(wanted.kernel, 0.0) + time.perf_counter() - start

    candidate = None if arch is None else 0
    with triton_runtime.compiling_for(arch, compile_and_time, candidate):
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
    if triton_runtime.interpreted():
        raise RuntimeError(f"arch={arch} cannot be compiled for: TRITON_INTERPRET is set")

    def without_memory(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shell = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return shell.requires_grad_(x.requires_grad)

    positional, keywords = pytree.tree_map(without_memory, arguments)
    return positional, {**keywords, "backend": triton_runtime.BACKEND}
