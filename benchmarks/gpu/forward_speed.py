"""How fast the CUDA forward of the package at hand is, a line a head size.

python -m benchmarks.gpu.forward_speed NAME
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fused_attn

from . import table

# TFLOP/s that the model says: as ptxas orders the exponentials, and beside the product.
MODEL = {64: "370-440, 420-470", 128: "540-620, 620-660", 256: "-, 5-12 % more"}
LENGTH = 8192


def line(name: str, head_dim: int) -> str:
    shape = (2, 2048 // head_dim, LENGTH, head_dim)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    time = seconds(lambda: fused_attn.attention(q, q, q, backend=table.BACKENDS[0]))
    flops = 4 * shape[0] * shape[1] * LENGTH**2 * head_dim
    rate = f"{flops / time / 1e12:.0f} TFLOP/s"
    return f"head size {head_dim:<4} {name:<20} {rate} (model, behind, beside: {MODEL[head_dim]})"


def seconds(run: Callable[[], object], rounds: int = 30) -> float:
    """Of one call, between events, after a few."""
    for _ in range(5):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / rounds / 1e3


def main(name: str) -> None:
    print(f"package: {Path(fused_attn.__file__).parent}", flush=True)
    for head_dim in MODEL:
        print(line(name, head_dim), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
