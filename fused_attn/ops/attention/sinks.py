"""Attention sinks: one more key a head, with a score of its own and value 0, worked in by lse.

No kernel needs to know of it. With z = exp(lse) the softmax's sum without the sink, every
probability shrinks by z / (z + exp(sink)) = sigmoid(lse - sink) (Xiao et al. 2023, "Efficient
streaming language models with attention sinks"; the learned form is that of OpenAI's GPT-OSS).
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(
    out: Tensor, lse: Tensor, weights: Tensor | None, sinks: Tensor, in_place: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention with sinks from attention without them; differentiable in all of its arguments.

    Args:
        out: (B, H, Lq, Dv). lse: (B, H, Lq).
        weights: (B, H, Lq, Lk), or None.
        sinks: (H,).
        in_place: write to `out` and `weights`; nobody may want a gradient.

    Returns:
        out, lse and weights with the sinks' share taken off; lse is the sink where no key is seen.
    """
    sink = sinks.to(lse.dtype)[:, None]
    # By hand: torch's logaddexp has NaN gradients where both sides are -inf.
    peak = torch.maximum(lse, sink).detach()
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    kept = torch.exp(lse - peak)
    total = kept + torch.exp(sink - peak)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    joined = torch.where(empty, -torch.inf, peak + torch.log(total))
    share = (kept / total)[..., None]
    if in_place:
        out.mul_(share)
        return out, joined, None if weights is None else weights.mul_(share)
    return (
        (out * share).to(out.dtype),
        joined,
        None if weights is None else (weights * share).to(weights.dtype),
    )


def gradient(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, sinks: Tensor) -> Tensor:
    """Of the sinks, from results that have them worked in: (H,).

    The sink's probability is p = exp(sink - lse) and its value 0, so dsink = p (dlse - dout . out)
    (the softmax's gradient, as Dao 2023, equation 4, has it for a key).
    """
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    p = torch.where(lse == -torch.inf, 0.0, p)
    delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(dim=-1)
    gradient = -delta if dlse is None else dlse - delta
    return (p * gradient).sum(dim=(0, 2)).to(sinks.dtype)
