"""The measurements of `make gpu`, one subcommand each; rows go to FUSED_ATTN_RESULTS as CSV.

    python -m benchmarks.gpu.measure {ceilings,repeat,small,attention,norms}

Before a figure counts, the output is held against float32 attention on the same inputs.
"""

from __future__ import annotations

import csv
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn

from .timing import milliseconds, working

DEVICE = torch.device("cuda")
TOKENS = 16 * 1024
HIDDEN = 2048
LENGTHS = (512, 2048, 8192, 16384)
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS = ("cuda", "triton")


def record(name: str, rows: list[dict[str, Any]]) -> None:
    """Write all rows again: a part that is stopped has lost nothing but the last one."""
    path = Path(os.environ.get("FUSED_ATTN_RESULTS", ".")) / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(rows[-1], flush=True)


def ceilings() -> None:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(2**29, device=DEVICE)
    y = torch.empty_like(x)
    times = milliseconds({"gemm": lambda: a @ b, "copy": lambda: y.copy_(x)})
    record("ceilings", [{
        "gemm_tflops": round(2 * 8192**3 / times["gemm"][0] / 1e9, 1),
        "copy_gbs": round(2 * x.numel() * 4 / times["copy"][0] / 1e6, 1),
    }])  # fmt: skip


def inputs(length: int, head_dim: int, grad: bool = False) -> list[Tensor]:
    shape = (TOKENS // length, HIDDEN // head_dim, length, head_dim)
    return [
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_(grad)
        for _ in range(3)
    ]


def forward_sides(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: fused_attn.attention(q, k, v, causal=causal, backend=backend)

    def torchs(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    return {
        **{name: ours(name) for name in OURS},
        **{name: torchs(backend) for name, backend in SDPA.items()},
        "flex": lambda: flex()(q, k, v, block_mask=block_mask(q.shape[2]) if causal else None),
    }


@functools.cache
def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def block_mask(length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether the last rows of the first head are right, against float32."""
    rows = slice(-64, None)
    scores = q[0, 0, rows].float() @ k[0, 0].float().T * q.shape[-1] ** -0.5
    if causal:
        i = torch.arange(q.shape[2] - 64, q.shape[2], device=DEVICE)[:, None]
        scores.masked_fill_(torch.arange(k.shape[2], device=DEVICE) > i, -torch.inf)
    expected = scores.softmax(-1) @ v[0, 0].float()
    return bool((out[0, 0, rows].float() - expected).abs().max() < 0.02)


def with_backward(function: Callable[[], Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    out = function()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)


def attention() -> None:
    rows: list[dict[str, Any]] = []
    for head_dim in (128, 64, 256):
        for causal in (False, True):
            for length in LENGTHS:
                for direction in ("forward", "backward"):
                    rows.append(attention_row(length, head_dim, causal, direction))
                    record("attention", rows)


def attention_row(length: int, head_dim: int, causal: bool, direction: str) -> dict[str, Any]:
    q, k, v = inputs(length, head_dim, grad=direction == "backward")
    sides, refused = working(forward_sides(q, k, v, causal))
    wrong = [x for x in OURS if x in sides and not check(sides[x](), q, k, v, causal)]
    flops = 4 * TOKENS * length * HIDDEN * (0.5 if causal else 1.0)
    calls: dict[str, Callable[[], object]] = dict(sides)
    if direction == "backward":
        flops *= 2.5
        calls = {name: with_backward(side, [q, k, v]) for name, side in sides.items()}
        calls, more = working(calls)
        refused.update(more)
    times = milliseconds({name: call for name, call in calls.items() if name not in wrong})
    row: dict[str, Any] = {
        "direction": direction, "head_dim": head_dim, "causal": causal, "length": length,
    }  # fmt: skip
    for name in (*OURS, *SDPA, "flex"):
        if name in wrong:
            row[name] = "WRONG"
        elif name in times:
            row[name] = round(flops / times[name][0] / 1e9, 1)
        else:
            row[name] = f"no: {refused.get(name, '?')}"
    return row


def norms() -> None:
    rows: list[dict[str, Any]] = []
    for width in (1024, 2048, 4096, 8192, 16384):
        count = 2**26 // width
        x, residual, dy = (
            torch.randn(count, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
        )
        weight, bias = (torch.randn(width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        x.requires_grad_()
        residual.requires_grad_()
        for direction in ("forward", "backward"):
            sides: dict[str, Callable[[], Any]] = {
                name: _norm(name, x, residual, weight, bias) for name in OURS
            }
            sides["torch"] = lambda x=x, r=residual, w=weight, b=bias: F.layer_norm(
                x + r, (x.shape[1],), w, b
            )
            sides, refused = working(sides)
            if direction == "backward":
                sides = {
                    name: _norm_backward(side, [x, residual], dy) for name, side in sides.items()
                }
            # Forward reads x and residual and writes y; backward reads x, residual and dy and
            # writes one gradient (that of both).
            moved = count * width * 2 * (3 if direction == "forward" else 4)
            times = milliseconds(sides)
            rows.append(
                {"direction": direction, "width": width}
                | {name: round(moved / times[name][0] / 1e6, 1) for name in times}
                | {name: f"no: {reason}" for name, reason in refused.items()}
            )
            record("norms", rows)


def _norm(
    backend: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Tensor]:
    return lambda: fused_attn.add_layer_norm(
        x, residual, (x.shape[1],), weight, bias, backend=backend
    )


def _norm_backward(
    function: Callable[[], Tensor], tensors: list[Tensor], dy: Tensor
) -> Callable[[], object]:
    y = function()
    return lambda: torch.autograd.grad(y, tensors, dy, retain_graph=True)


def repeat() -> None:
    """The same call twenty times: every bit must be the same, forward and backward."""
    for backend in OURS:
        for head_dim in (64, 128, 256):
            q, k, v = inputs(2048, head_dim, grad=True)
            first = None
            for _ in range(20):
                out = fused_attn.attention(q, k, v, causal=True, backend=backend)
                grads = torch.autograd.grad(out.float().sum(), (q, k, v))
                results = (out, *grads)
                if first is None:
                    first = results
                for name, a, b in zip(("out", "dq", "dk", "dv"), first, results, strict=True):
                    if not torch.equal(a, b):
                        raise SystemExit(f"{backend}, head size {head_dim}: {name} does not repeat")
        print(f"{backend}: 20 calls of each head size repeat bit for bit")


def small() -> None:
    """A few small calls, for compute-sanitizer."""
    for backend in OURS:
        for head_dim in (40, 64, 128, 256):
            for causal in (False, True):
                q, k, v = (
                    torch.randn(2, 2, n, head_dim, device=DEVICE, dtype=torch.bfloat16)
                    .requires_grad_()
                    for n in (200, 333, 333)
                )  # fmt: skip
                out = fused_attn.attention(q, k, v, causal=causal, backend=backend)
                out.float().sum().backward()
        x = torch.randn(300, 1000, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        fused_attn.add_layer_norm(x, x, (1000,), backend=backend).float().sum().backward()
    torch.cuda.synchronize()


PARTS = {f.__name__: f for f in (ceilings, repeat, small, attention, norms)}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        raise SystemExit(f"usage: python -m benchmarks.gpu.measure {{{','.join(PARTS)}}}")
    torch.manual_seed(0)
    PARTS[sys.argv[1]]()
