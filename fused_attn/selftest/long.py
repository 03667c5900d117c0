"""Attention over 64k tokens of one packed tensor, against float64.

The formula goes through the queries in pieces, so that no more than some million scores exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.attention import call
from ..ops.attention.problem import Operands
from ..testing import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget

TOKENS = 65_536
PIECE, NARROW_PIECE = 1024, 256  # queries at a time, of all keys and of a window
LARGE = 40 << 30  # bytes of a GPU that has room for offsets of more than 32 bits


def check(
    backend: str,
    device: str,
    dtype: torch.dtype,
    window: int | None,
    *,
    tokens: int = TOKENS,
    heads: int = 1,
    head_dim: int = 64,
) -> None:
    """Forward and backward of causal attention whose q, k and v are the last heads of a slice.

    Args:
        window: how many keys before it a query sees; None for all.

    Raises:
        AssertionError: a result is over its budget.
    """
    g = torch.Generator().manual_seed(0)
    shape = (1, tokens, 3, _heads_in_memory(device, heads), head_dim)
    packed = torch.full(shape, torch.nan, dtype=dtype, device=device)
    numbers = torch.randn((1, tokens, 3, heads, head_dim), generator=g)
    packed[..., -heads:, :] = numbers.to(device, dtype)
    q, k, v = (packed[:, :, i, -heads:].transpose(1, 2).requires_grad_() for i in range(3))
    left = None if window is None else (window, 0)
    scalars = call.Scalars(causal=True, window=left, backend=backend)
    out = call.run(Operands(q, k, v), scalars)[0]
    assert out is not None
    dout = torch.randn(out.shape, generator=g).to(device, dtype)
    ours = (out, *torch.autograd.grad(out, (q, k, v), dout))
    plain = _formula((q, k, v), dout, dtype if dtype.itemsize < 8 else torch.float32, window)
    true = _formula((q, k, v), dout, torch.float64, window)
    names = ("out", *(f"gradient of {name}" for name in "qkv"))
    for i, name in enumerate(names):
        factor = FORWARD_FACTOR if i == 0 else BACKWARD_FACTOR
        assert_within_budget(name, ours[i], plain[i].to(ours[i].dtype), true[i], factor)


def _heads_in_memory(device: str, heads: int) -> int:
    """Of the tensor that is sliced: enough for its offsets to need more than 32 bits."""
    if not device.startswith("cuda"):
        return 2 * heads
    return 192 if torch.cuda.get_device_properties(device).total_memory > LARGE else 16


def _formula(
    tensors: tuple[Tensor, ...], dout: Tensor, dtype: torch.dtype, window: int | None
) -> tuple[Tensor, ...]:
    """out and the gradients, all arithmetic in `dtype`; sums over pieces in float32 at least."""
    q, k, v = (x.detach().to(dtype) for x in tensors)
    wide = torch.promote_types(dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    position = torch.arange(q.shape[2], device=q.device)
    step = PIECE if window is None else NARROW_PIECE
    for begin in range(0, q.shape[2], step):
        end = min(begin + step, q.shape[2])
        first = 0 if window is None else max(0, begin - window)
        points = [x.detach().requires_grad_() for x in (q[:, :, begin:end], k[:, :, first:end],
                                                        v[:, :, first:end])]  # fmt: skip
        i, j = position[begin:end, None], position[None, first:end]
        seen = j <= i if window is None else (j <= i) & (i - j <= window)
        scores = points[0] @ points[1].transpose(-1, -2) * q.shape[3] ** -0.5
        piece = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ points[2]
        grads = torch.autograd.grad(piece, points, dout[:, :, begin:end].to(dtype))
        out[:, :, begin:end], dq[:, :, begin:end] = piece.detach(), grads[0]
        dk[:, :, first:end] += grads[1]
        dv[:, :, first:end] += grads[2]
    return out, dq, dk, dv
