"""Host time of Triton's calls: worked out each time, and repeated from notes; no GPU is needed.

    python -m benchmarks.host_time [--only TEXT] [--save]

Triton's own launcher runs over a stand-in for libcuda (`fake_gpu`), so that everything is there
but the driver's share of a launch and the caching allocator of a GPU. Thread CPU time on one core,
least of the turns, in microseconds a call. Beside it stands what torch's own function takes on the
CPU for a call with nothing to compute: torch's way to a CUDA kernel cannot be run without a GPU,
and that is the nearest to it that can be measured. It is no peer to be beaten.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attn
from benchmarks import fake_gpu
from benchmarks.suites.machine import RESULTS, folder_name
from benchmarks.suites.results import save_rows
from fused_attn.runtime.triton import replay

ROUNDS, CALLS = 15, 300
Run = Callable[[], object]


class Case(NamedTuple):
    """A call of ours, and torch's for something tiny on the CPU."""

    name: str
    ours: Run
    torchs: Run | None


def half(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float16).requires_grad_(grad)


def tiny(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).requires_grad_(grad)


def _step(forward: Callable[..., Tensor], wanted: tuple[Tensor, ...]) -> Run:
    """Forward and backward."""
    dout = torch.ones_like(forward(*wanted))
    return lambda: torch.autograd.grad(forward(*wanted), wanted, dout)


def cases() -> Iterator[Case]:
    attention = functools.partial(fused_attn.attention, backend="triton")
    sdpa, small = F.scaled_dot_product_attention, (1, 1, 1, 8)
    q, k, v = (half(1, 2, 64, 64) for _ in "qkv")
    a, b, c = (tiny(*small) for _ in "qkv")
    yield Case("attention", lambda: attention(q, k, v), lambda: sdpa(a, b, c))
    causal = functools.partial(attention, q, k, v, causal=True)
    yield Case("attention, causal", causal, lambda: sdpa(a, b, c, is_causal=True))
    long = half(1, 1, 1024, 64)
    yield Case("attention, L 1024, by descriptors", lambda: attention(long, long, long), None)
    one, cache = half(1, 2, 1, 64), half(1, 2, 4096, 64)
    yield Case("decoding", lambda: attention(one, cache, cache), None)
    ours = tuple(half(1, 2, 64, 64, grad=True) for _ in "qkv")
    theirs = tuple(tiny(*small, grad=True) for _ in "qkv")
    yield Case("attention, forward + backward", _step(attention, ours), _step(sdpa, theirs))
    x, weight, tx, tw = half(16, 768), half(768), tiny(1, 8), tiny(8)
    norm = functools.partial(fused_attn.layer_norm, normalized_shape=(768,), backend="triton")
    yield Case(
        "layer_norm",
        lambda: norm(x, weight=weight, bias=weight),
        lambda: F.layer_norm(tx, (8,), tw, tw),
    )
    ours = tuple(half(*size, grad=True) for size in ((16, 768), (768,), (768,)))
    theirs = tuple(tiny(*size, grad=True) for size in ((1, 8), (8,), (8,)))
    yield Case(
        "layer_norm, forward + backward",
        _step(lambda x, w, b: norm(x, weight=w, bias=b), ours),
        _step(lambda x, w, b: F.layer_norm(x, (8,), w, b), theirs),
    )
    activated = functools.partial(fused_attn.bias_activation, activation="gelu", backend="triton")
    yield Case("bias_activation", lambda: activated(x, weight), lambda: F.gelu(tx + tw))


def rows(only: str) -> Iterator[dict[str, object]]:
    with fake_gpu.standing_in() as gpu:
        for case in cases():
            if only in case.name:
                yield _row(case, gpu)


def _row(case: Case, gpu: fake_gpu.FakeGpu) -> dict[str, object]:
    sides: dict[str, tuple[Run, int]] = {"as_ever": (case.ours, 1), "repeated": (case.ours, 0)}
    if case.torchs is not None:
        sides["torch_tiny_cpu"] = (case.torchs, 0)
    for _ in range(4):  # compiled, seen, noted, repeated
        case.ours()
    before = gpu.launches()
    case.ours()
    row: dict[str, object] = {"call": case.name, "launches": gpu.launches() - before}
    least = dict.fromkeys(sides, math.inf)
    for _ in range(ROUNDS):
        for name, (run, paused) in sides.items():
            with mock.patch.object(replay, "_paused", paused):
                least[name] = min(least[name], _seconds(run))
    row |= {f"{name}_us": round(least[name] * 1e6, 1) for name in sides}
    row.setdefault("torch_tiny_cpu_us", "")
    return row


def _seconds(run: Run) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        run()
    return (time.thread_time() - start) / CALLS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    options = parser.parse_args(arguments)
    reason = fake_gpu.why_not()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found = []
    for row in rows(options.only):
        found.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if options.save and found:
        save_rows(RESULTS / folder_name() / "host_time.csv", found, "call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
