"""What a vector saves beside the dense mask that says the same: memory, and CPU time of one thread.

`python -m benchmarks.operands [--length 2048] [--repeats 5]` prints a table. The mask is built once
a call, as who has the vector alone must; time is the thread's own, so that other work beside
matters less.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fused_attn import attention

HEADS, HEAD_DIM = 8, 64


def dense(length: int, operands: dict[str, Any]) -> Tensor:
    """The mask (1, 1, L, L) that says what `operands` say."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = torch.ones(1, 1, length, length, dtype=torch.bool)
    if operands.get("causal"):
        seen = i >= j
        if "prefix_lengths" in operands:
            seen = seen | (j < operands["prefix_lengths"][:, None, None, None])
        visible = visible & seen
    if "chunk" in operands:
        visible = visible & (i // operands["chunk"] == j // operands["chunk"])
    if "document_ids" in operands:
        ids = operands["document_ids"]
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    return visible


def cases(length: int) -> dict[str, dict[str, Any]]:
    ids = (torch.arange(length) * 8 // length)[None]
    return {
        "8 documents": {"document_ids": ids},
        "8 documents, causal": {"document_ids": ids, "causal": True},
        "documents in any order": {"document_ids": ids[:, torch.randperm(length)]},
        "prefix of a quarter, causal": {
            "prefix_lengths": torch.tensor([length // 4]), "causal": True},
        "chunk of an eighth, causal": {"chunk": length // 8, "causal": True},
    }  # fmt: skip


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of the thread's own time."""
    times = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    length = arguments.length
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, HEADS, length, HEAD_DIM)

    def step(function: Callable[..., Tensor], backward: bool, **operands: Any) -> None:
        with torch.set_grad_enabled(backward):
            out = function(q, k, v, **operands)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)

    def by_vector(operands: dict[str, Any], backward: bool) -> None:
        step(attention, backward, **operands)

    def by_mask(operands: dict[str, Any], backward: bool) -> None:
        step(attention, backward, mask=dense(length, operands))

    def by_torch(operands: dict[str, Any], backward: bool) -> None:
        step(scaled_dot_product_attention, backward, attn_mask=dense(length, operands))

    ways = {"torch, mask": by_torch, "ours, mask": by_mask, "ours, vector": by_vector}
    times = [f"{kind}: {way}" for kind in ("forward", "training step") for way in ways]
    print(f"| operand | its bytes | mask's bytes | {' | '.join(times)} |")
    print("|---" * (len(times) + 3) + "|")
    for name, operands in cases(length).items():
        size = sum(x.nbytes for x in operands.values() if isinstance(x, Tensor))
        row = [name, f"{size}", f"{dense(length, operands).nbytes}"]
        for backward in (False, True):
            for way in ways.values():
                call = functools.partial(way, operands, backward)
                row.append(f"{seconds(call, arguments.repeats) * 1e3:.0f} ms")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
