"""Attention on the GPU against SDPA's backends, forced by name, compiled FlexAttention and the
plain formula: median device time, TFLOP/s. Peers that refuse a shape are named with their reason.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn

PEERS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEADS_TIMES_DIM = 2048
TOKENS = 16384


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        mask = None
        if causal:
            length = q.shape[2]
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return compiled(q, k, v, block_mask=mask)

    return run


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(~torch.ones_like(s[0, 0], dtype=torch.bool).tril(), -torch.inf)
    return torch.softmax(s, -1) @ v


def providers() -> dict[str, Callable[..., Tensor]]:
    ours = {"triton": lambda q, k, v, c: fused_attn.attention(q, k, v, causal=c, backend="triton")}
    peers = {
        name: lambda q, k, v, c, backend=backend: sdpa(backend, q, k, v, c)
        for name, backend in PEERS.items()
    }
    return {**ours, **peers, "flex": flex(), "plain": plain}


def median_seconds(run: Callable[[], object], flush: Tensor, repeats: int = 20) -> float:
    """Median device time of `run`, the L2 cache flushed before each."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def measure(name: str, provider: Callable[..., Tensor], shape: tuple[int, ...], causal: bool,
            backward: bool, flush: Tensor) -> float:  # fmt: skip
    """TFLOP/s: 4 B H L L D forward, half if causal; 2.5 times that backward."""
    batch, heads, length, head_dim = shape
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for _ in range(3)
    )
    work = 4.0 * batch * heads * length * length * head_dim * (0.5 if causal else 1.0)
    if not backward:
        return work / median_seconds(lambda: provider(q, k, v, causal), flush) * 1e-12
    out = provider(q, k, v, causal)
    dout = torch.randn_like(out)
    run = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: E731
    return 2.5 * work / median_seconds(run, flush) * 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--save", type=Path, help="CSV file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a GPU that torch can use")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows = []
    for head_dim in options.head_dims:
        for length in options.lengths:
            shape = (max(TOKENS // length, 1), HEADS_TIMES_DIM // head_dim, length, head_dim)
            for causal in (False, True):
                for backward in (False, True):
                    for name, provider in providers().items():
                        row = [name, head_dim, length, causal, backward]
                        try:
                            rate = measure(name, provider, shape, causal, backward, flush)
                            row.append(f"{rate:.0f}")
                        except (RuntimeError, NotImplementedError) as error:
                            row.append(str(error).splitlines()[0][:80])
                        rows.append(row)
                        print(*row, sep="\t", flush=True)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        with options.save.open("w", newline="") as file:
            header = ["provider", "head_dim", "length", "causal", "backward", "tflops"]
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
