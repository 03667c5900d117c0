"""What goes wrong on hardware and nowhere else: each a case of every operation it applies to.

Where a case says nothing (no GPU to capture a graph on, say) it is skipped, with the reason.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops.attention import call as attention_call
from ..ops.attention.problem import Operands as AttentionOperands
from ..ops.layer_norm import call as norm_call
from ..ops.layer_norm.problem import Operands as NormOperands
from . import calls, long
from .calls import DTYPES, Call
from .memory import Skipped, at_the_end, slice_with_sentinels

REPEATS = 20
WINDOW = 128  # keys that a query of a long call sees, but where all are asked for
Check = Callable[[str, str], None]  # (backend, device)


def checks(operation: str, dtype: str, quick: bool) -> Iterator[tuple[str, int, Check]]:
    """(name, head size or 0, check), the cold thread first: it must be first in its process."""
    make = _CALLS[operation]
    size = 64 if operation == "attention" else 0
    call = functools.partial(make, dtype)
    yield "cold thread", size, functools.partial(cold_thread, call)
    yield "ends at the end of its memory", size, functools.partial(at_the_end_of_memory, call)
    yield f"{REPEATS} repeats bit by bit", size, functools.partial(repeats, call)
    yield "captured in a CUDA graph", size, functools.partial(captured, call)
    yield "second device", size, functools.partial(second_device, call)
    if operation == "attention":
        for odd in (37, 100) if quick else (1, 37, 100, 129):
            yield f"head size {odd} into a slice", odd, functools.partial(into_a_slice, dtype, odd)
        if dtype == "bfloat16" or not quick:
            run = functools.partial(many_tokens, dtype, WINDOW)
            yield "64k tokens of a packed tensor", 64, run
        if dtype == "bfloat16":
            yield "64k tokens, all keys", 64, functools.partial(many_tokens, dtype, None)
    if operation == "layer_norm":
        yield "width 97 into a slice", 0, functools.partial(norm_into_a_slice, dtype)
        yield "growing widths, backward", 0, functools.partial(growing_widths, dtype)


def _attention(dtype: str) -> Call:
    return calls.attention(dtype, 64, (2, 4, 2, 129, 143), {"causal": True})


def _layer_norm(dtype: str) -> Call:
    return calls.layer_norm(dtype, 37, 1000, False)


def _bias_activation(dtype: str) -> Call:
    return calls.bias_activation(dtype, 37, 130, "gelu", False)


def _embedding(dtype: str) -> Call:
    return calls.embedding(dtype, 17, 11, 129)


def _linear(dtype: str) -> Call:
    return calls.linear(dtype, 37, 130, 65)


_CALLS = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "bias_activation": _bias_activation,
    "embedding": _embedding,
    "linear": _linear,
}


def cold_thread(make: Callable[[], Call], backend: str, device: str) -> None:
    """On a thread that has done nothing on the device before."""
    call = make().to(device)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call.check(backend)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def at_the_end_of_memory(make: Callable[[], Call], backend: str, device: str) -> None:
    make().to(device).placed(at_the_end).check(backend)


def repeats(make: Callable[[], Call], backend: str, device: str) -> None:
    """The same call gives the same bits, under torch's switch for that."""
    call = make().to(device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = call.results(backend)
        for _ in range(REPEATS - 1):
            for a, b in zip(first, call.results(backend), strict=True):
                assert torch.equal(a, b), "two runs differ"
    finally:
        torch.use_deterministic_algorithms(before)


def captured(make: Callable[[], Call], backend: str, device: str) -> None:
    """A graph replays forward and backward, on other numbers in the same memory."""
    if not device.startswith("cuda"):
        raise Skipped("needs a GPU")
    call = make().to(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.results(backend)  # a first call compiles and makes plans
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call.results(backend)
    with torch.no_grad():
        for x in call.tensors.values():
            if x.is_floating_point():
                x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, call.results(backend), strict=True):
        torch.testing.assert_close(a, b)


def second_device(make: Callable[[], Call], backend: str, device: str) -> None:
    """Tensors on another GPU than the current one."""
    if not device.startswith("cuda") or torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    other = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    make().to(f"cuda:{other}").check(backend)


def into_a_slice(dtype: str, size: int, backend: str, device: str) -> None:
    """`out` is a slice of wider rows; what lies beside it stays."""
    call = calls.attention(dtype, size, (2, 2, 2, 70, 90), {}).to(device)
    operands = AttentionOperands(**{n: x.detach() for n, x in call.tensors.items()})
    out, beside = slice_with_sentinels(operands.q)
    scalars = attention_call.Scalars(backend=backend)
    attention_call.run(operands, scalars, out=out)
    expected = attention_call.run(operands, scalars)[0]
    _same_and_apart(out, expected, beside)
    call.check(backend)


def norm_into_a_slice(dtype: str, backend: str, device: str) -> None:
    call = calls.layer_norm(dtype, 37, 97, False).to(device)
    operands = NormOperands(**{n: x.detach() for n, x in call.tensors.items()})
    out, beside = slice_with_sentinels(operands.x)
    scalars = norm_call.Scalars((97,), 1e-5, False, backend=backend)
    norm_call.run(operands, scalars, out=out)
    _same_and_apart(out, norm_call.run(operands, scalars)[0], beside)


def _same_and_apart(out: Tensor, expected: Tensor | None, beside: Tensor) -> None:
    assert expected is not None
    assert torch.equal(out, expected), "a slice gets other results"
    assert bool((beside == 7.0).all()), "what lies beside `out` was overwritten"


def growing_widths(dtype: str, backend: str, device: str) -> None:
    """A wider row asks the kernels for more of what they were given for a narrower one."""
    for width in (256, 768, 1024, 4096, 8192):
        calls.layer_norm(dtype, 8, width, False).to(device).check(backend)


def many_tokens(dtype: str, window: int | None, backend: str, device: str) -> None:
    if window is None and not device.startswith("cuda"):
        raise Skipped("takes minutes on a CPU")
    long.check(backend, device, DTYPES[dtype], window)
