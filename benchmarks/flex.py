"""`flex_attention` beside torch's, compiled and eager, on the CPU, in one process and by turns.

    python -m benchmarks.flex [--only TEXT] [--lengths 512 2048 8192] [--save]

Forward time (one thread of CPU time, least of the turns), the first call in seconds of wall time
(torch's with compilation, its caches off), and peak memory beyond the operands. Torch's flex has no
backward on a CPU, so forward + backward stands beside the dense formula. Batch 1, 8 heads, head
size 64, float32. The table says how far the outputs are apart.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from benchmarks.suites import memory
from benchmarks.suites.machine import RESULTS, folder_name
from benchmarks.suites.results import save_rows
from fused_attn import flex_attention

HEADS, SIZE = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
DENSE_UP_TO = 2048  # beyond, what holds all scores takes gigabytes and minutes
ROUNDS = 5


@dataclass(frozen=True)
class Functions:
    """A change of scores and a mask for one length; either may be None."""

    score: Callable[..., Tensor] | None
    mask: Callable[..., Tensor] | None


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def _functions(length: int) -> dict[str, Functions]:
    table = torch.randn(HEADS, 2 * length)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1).float()
    temperature = torch.rand(HEADS) + 0.5
    documents = torch.arange(length) // 200
    width = 2 ** round(math.log2(length) / 2)
    return {
        "causal": Functions(None, causal),
        "window": Functions(None, lambda b, h, q, kv: (q >= kv) & (q - kv <= 256)),
        "documents": Functions(None, lambda b, h, q, kv: documents[q] == documents[kv]),
        "dilated": Functions(None, lambda b, h, q, kv: (q >= kv) & ((q - kv) % 4 == 0)),
        "neighbourhood": Functions(
            None,
            lambda b, h, q, kv: (
                ((q // width - kv // width).abs() <= 3) & ((q % width - kv % width).abs() <= 3)
            ),
        ),
        "alibi": Functions(lambda s, b, h, q, kv: s + slopes[h] * (kv - q), causal),
        "softcap": Functions(lambda s, b, h, q, kv: 20.0 * torch.tanh(s / 20.0), causal),
        "relative bias": Functions(lambda s, b, h, q, kv: s + table[h, q - kv + length], None),
        "score * |score|": Functions(lambda s, b, h, q, kv: s * s.abs(), causal),
        "temperature": Functions(lambda s, b, h, q, kv: s * temperature[h], causal),
        "tanh of distance": Functions(
            lambda s, b, h, q, kv: s + torch.tanh((q - kv) / 100.0), None
        ),
    }


def rows(only: str, lengths: list[int]) -> Iterator[dict[str, object]]:
    # Its default of eight shapes would fall back to eager after some rows.
    torch._dynamo.config.recompile_limit = 1 << 10
    torch._inductor.config.force_disable_caches = True
    for length in lengths:
        for name, functions in _functions(length).items():
            label = f"{name} {length}"
            if only in label:
                yield _row(label, functions, length)


def _row(label: str, functions: Functions, length: int) -> dict[str, object]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, SIZE) for _ in range(3))
    mask = functions.mask
    blocks = None
    if mask is not None:
        blocks = torch_flex.create_block_mask(mask, None, None, length, length, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: flex_attention(q, k, v, functions.score, blocks),
        "compiled": lambda: compiled(q, k, v, functions.score, blocks),
    }
    if length <= DENSE_UP_TO:
        sides["eager"] = lambda: torch_flex.flex_attention(q, k, v, functions.score, blocks)
    row: dict[str, object] = {"functions": label}
    outputs = {}
    with torch.no_grad():
        for side, run in sides.items():
            start = time.perf_counter()
            outputs[side] = run()
            row[f"{side}_first_s"] = round(time.perf_counter() - start, 3)
        for side, seconds in _by_turns(sides).items():
            row[f"{side}_ms"] = round(seconds * 1e3, 2)
        for side, run in sides.items():
            row[f"{side}_mib"] = _peak(run)
    row["ratio"] = round(float(str(row["compiled_ms"])) / float(str(row["ours_ms"])), 2)
    row["apart"] = f"{(outputs['ours'] - outputs['compiled']).abs().max():.1e}"
    row |= _training(functions, blocks, (q, k, v), length)
    for name in ("eager_first_s", "eager_ms", "eager_mib", "dense_step_ms", "step_ratio"):
        row.setdefault(name, "")
    return row


def _training(
    functions: Functions, blocks: Any, qkv: tuple[Tensor, ...], length: int
) -> dict[str, object]:
    """Forward and backward, beside the formula on all scores where those fit."""
    q, k, v = (x.requires_grad_() for x in qkv)
    dout = torch.randn_like(q)

    def step(run: Callable[[], Tensor]) -> None:
        torch.autograd.grad(run(), (q, k, v), dout)

    sides = {"step": lambda: step(lambda: flex_attention(q, k, v, functions.score, blocks))}
    if length <= DENSE_UP_TO:
        sides["dense_step"] = lambda: step(lambda: _dense(functions, q, k, v))
    found = _by_turns(sides)
    row: dict[str, object] = {f"{side}_ms": round(x * 1e3, 2) for side, x in found.items()}
    if "dense_step" in found:
        row["step_ratio"] = round(found["dense_step"] / found["step"], 2)
    return row


def _dense(functions: Functions, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, on all scores."""
    scores = q @ k.mT / math.sqrt(SIZE)
    b, h, i, j = (
        torch.arange(n).view([-1 if place == d else 1 for place in range(4)])
        for d, n in enumerate(scores.shape)
    )
    if functions.score is not None:
        scores = functions.score(scores, b, h, i, j)
    if functions.mask is not None:
        scores = scores.masked_fill(~functions.mask(b, h, i, j), -torch.inf)
    return scores.softmax(-1) @ v


def _by_turns(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    least = dict.fromkeys(sides, math.inf)
    for _ in range(ROUNDS):
        for side, run in sides.items():
            start = time.thread_time()
            run()
            least[side] = min(least[side], time.thread_time() - start)
    return least


def _peak(run: Callable[[], Any]) -> object:
    if memory.why_not("cpu") is not None:
        return ""
    return round(memory.peak_bytes(run, "cpu") / 2**20, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for row in rows(options.only, list(options.lengths)):
        found.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if options.save and found:
        save_rows(RESULTS / folder_name() / "flex.csv", found, "functions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
