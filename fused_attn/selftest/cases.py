"""The cases of a self-test: small calls of every operation, with all that is likely to go wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import calls, hard, speed
from .calls import DTYPES, Call

__all__ = ["DTYPES", "HOWS", "Case", "cases"]

QUICK, FULL, SAMPLE = HOWS = ("quick", "full", "sample")
_SAMPLED_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One thing to find out.

    Attributes:
        size: the larger head size of an attention, else 0; with the dtype it says which kernels are
            meant.
        run: (backend, device) -> None, or how fast the backend is beside torch's own; raises where
            a result is wrong, and `memory.Skipped` where nothing can be said.
    """

    operation: str
    name: str
    dtype: str
    size: int
    run: Callable[[str, str], float | None]
    timed: bool = False


def cases(operation: str, how: str) -> Iterator[Case]:
    """The cases of an operation, those that must come first in a process first.

    Args:
        how: "full"; "quick": fewer; "sample": the plainest, for what differs little.
    """
    dtypes = _SAMPLED_DTYPES if how == SAMPLE else tuple(DTYPES)
    if how != SAMPLE:
        for dtype in dtypes:
            for name, size, check in hard.checks(operation, dtype, how == QUICK):
                yield Case(operation, name, dtype, size, check)
    for dtype in dtypes:
        for name, size, call in _CALLS[operation](dtype, how != FULL):
            yield Case(operation, name, dtype, size, functools.partial(_check, call))
    for dtype in dtypes:
        for size in _sizes(operation, how):
            run = functools.partial(speed.ratio, operation, dtype, size)
            yield Case(operation, "speed", dtype, size, run, timed=True)


def _check(call: Callable[[], Call], backend: str, device: str) -> None:
    call().to(device).check(backend)


def _sizes(operation: str, how: str) -> tuple[int, ...]:
    if operation == "linear":
        return (0, 64)  # many rows, few rows
    if operation != "attention":
        return (0,)
    return (64,) if how == SAMPLE else (64, 128, 256)


Calls = Iterator[tuple[str, int, Callable[[], Call]]]

# (batch, heads, key heads, queries, keys), options: tile edges, grouped heads, every operand.
_ATTENTION: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "causal": ((2, 4, 2, 200, 200), {"causal": True}),
    "one past the tiles": ((1, 2, 2, 129, 257), {}),
    "decode": ((2, 8, 2, 1, 1025), {"causal": "lower_right"}),
    "padding, bias": ((2, 2, 2, 70, 130), {"padding": True, "bias": True}),
    "mask, window": ((2, 2, 1, 66, 190), {"mask": True, "window": (40, 10)}),
    "slice of a buffer": ((2, 2, 2, 65, 65), {"sliced": True, "causal": True}),
    "dropout": ((1, 2, 2, 70, 90), {"dropout_p": 0.2}),
    "softcap, alibi": ((1, 4, 4, 64, 128), {"softcap": 5.0, "alibi": True}),
    "documents, chunk": ((2, 2, 1, 150, 150), {"documents": True, "chunk": 100}),
    "prefix, window": ((2, 2, 2, 70, 190), {"prefix": True, "window": (30, 0)}),
}
_QUICK = ("causal", "one past the tiles", "decode", "padding, bias")


def _attention(dtype: str, quick: bool) -> Calls:
    for size in (64, 40, 128, 256):
        for name, (sizes, options) in _ATTENTION.items():
            if quick and (name not in _QUICK or size == 40):
                continue
            call = functools.partial(calls.attention, dtype, size, sizes, options)
            yield f"{name}, head size {size}", size, call


def _layer_norm(dtype: str, quick: bool) -> Calls:
    # The widths grow: a kernel's resources are asked for anew.
    for width in (256, 768, 1000) if quick else (1, 64, 256, 768, 1000, 4096, 8192):
        for rms in (False, True):
            call = functools.partial(calls.layer_norm, dtype, 37, width, rms)
            yield f"{'RMS' if rms else 'layer'} norm of {width}", 0, call


def _bias_activation(dtype: str, quick: bool) -> Calls:
    for activation in ("relu", "gelu") if quick else ("relu", "gelu", "gelu_tanh", "silu"):
        for gated in (False, True):
            call = functools.partial(calls.bias_activation, dtype, 37, 130, activation, gated)
            yield f"{'gated ' if gated else ''}{activation}", 0, call


def _embedding(dtype: str, quick: bool) -> Calls:
    for width in (64, 513) if quick else (1, 64, 513, 1024):
        yield f"rows of {width}", 0, functools.partial(calls.embedding, dtype, 17, 11, width)


def _linear(dtype: str, quick: bool) -> Calls:
    for width in (64, 513) if quick else (1, 64, 513, 1024):
        for rows, size in ((137, 0), (9, 64)):
            call = functools.partial(calls.linear, dtype, rows, width, 130)
            yield f"{rows} rows of {width}", size, call


_CALLS = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "bias_activation": _bias_activation,
    "embedding": _embedding,
    "linear": _linear,
}
