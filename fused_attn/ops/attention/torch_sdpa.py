"""torch's own fused attention, wherever it can express the call.

It serves calls where ours are not verified (GPUs), or where the machine has matrix instructions
that ours do not use (AMX's of float16, or AMX below the level of it). What torch leaves open is
settled here as everywhere: a row that sees no key gives 0, and NaN in a key that nobody sees has no
effect.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from ...runtime import higher_order, processor
from . import reference
from .problem import NO_WEIGHTS, UPPER_LEFT, AttentionProblem, Operands, Options

NAME = "sdpa"
IS_FORMULA = IS_TORCH = True  # ordinary torch code: whoever traces sees torch's operator
OPERANDS = frozenset(("bias", "mask", "key_padding_mask", "key_lengths")) | {
    *("query_documents", "key_documents", "prefix_lengths")  # by a mask (B, 1, Lq, Lk)
}
GRADIENTS = frozenset(("q", "k", "v", "bias"))


def why_not(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.device.type not in ("cpu", "cuda"):
        reasons.append(f"needs tensors on the CPU or a GPU, these are on {problem.device}")
    if problem.options.softcap:
        reasons.append("knows no softcap")
    if problem.options.scale <= 0:
        reasons.append(f"torch's masks take a positive scale, got scale={problem.options.scale:g}")
    if problem.return_lse:
        reasons.append("returns no lse")
    if problem.weights != NO_WEIGHTS:
        reasons.append("returns no attention weights")
    if higher_order.needs_formula() or higher_order.forward_mode():
        reasons.append("has no forward-mode derivative and no second one inside a transform")
    return reasons


def only_by_name(problem: AttentionProblem) -> str | None:
    """On a CPU ours are the faster ones, but for matrix instructions that they do not use."""
    if problem.device.type == "cuda" or _torch_has_more(problem.dtype):
        return None
    return "our own kernels are faster here"


def _torch_has_more(dtype: torch.dtype) -> bool:
    """Whether torch's kernels of `dtype` use matrix instructions of this CPU that ours do not."""
    if dtype == torch.float16:
        return processor.has("amx_fp16")
    return dtype == torch.bfloat16 and processor.has("amx_tile") and not processor.our_tiles()


def forward(
    operands: Operands, options: Options, weights: int = NO_WEIGHTS
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out, and None for lse and weights, which torch does not return."""
    assert weights == NO_WEIGHTS, "why_not refuses weights"
    inputs = operands[:4]
    if not is_compiling() and any(x is not None and x.requires_grad for x in inputs):
        return _Sdpa.apply(*inputs, operands[4:], options), None, None
    return _formula(operands, options), None, None


def _formula(operands: Operands, options: Options) -> Tensor:
    """torch's function on what it can read, and zeros where nothing is seen."""
    q, k, v, bias = operands[:4]
    plain = options.window_left < 0 and options.window_right < 0 and not options.chunk
    hidden = any(x is not None for x in operands[3:])
    if plain and not hidden and options.causal in (0, UPPER_LEFT):
        causal = options.causal == UPPER_LEFT
        if not causal or q.shape[2] >= k.shape[2]:  # else keys are left that nobody sees
            return _sdpa(q, k, v, None, causal, options.scale)
    shift = k.shape[2] - q.shape[2]
    visible = reference.visible_pairs(operands, options, shift)
    assert visible is not None
    seen = visible.expand(q.shape[0], -1, -1, -1).flatten(1, 2).any(dim=1)[:, None, :, None]
    k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)
    mask = visible
    if bias is not None:
        bias = torch.where(visible, bias, 0.0).to(q.dtype)
        mask = bias.masked_fill(~visible, -torch.inf)
    out = _sdpa(q, k, v, mask, False, options.scale)
    return torch.where(visible.any(dim=-1, keepdim=True), out, 0.0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    options: Any = {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
    if is_compiling():
        return torch_attention(q, k, v, attn_mask=mask, **options).contiguous()
    with _running():
        return torch_attention(q, k, v, attn_mask=mask, **options).contiguous()


class _Running(threading.local):
    depth = 0


_local = _Running()


def is_running() -> bool:
    """True where torch's kernels are called on behalf of this backend, in this thread.

    `integrations.torch_sdpa` puts ours in their place; here torch's own are meant.
    """
    return _local.depth > 0


@contextlib.contextmanager
def _running() -> Iterator[None]:
    _local.depth += 1
    try:
        yield
    finally:
        _local.depth -= 1


class _Sdpa(torch.autograd.Function):
    """torch's function with its own backward, and derivatives of it through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        masks: tuple[Tensor | None, ...],
        options: Options,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:4]
        with torch.enable_grad():
            points: Any = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip((q, k, v, bias), needs, strict=True)
            ]
            out = _formula(Operands(*points, *masks), options)
        ctx.save_for_backward(q, k, v, bias, *masks)
        ctx.points, ctx.out, ctx.options = points, out, options
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors)
        grads: Sequence[Tensor | None]
        if higher_order.backward_needs_formula((dout,)):

            def formula(*inputs: Tensor | None) -> tuple[Tensor]:
                changed: Any = dict(zip(("q", "k", "v", "bias"), inputs, strict=True))
                return (reference.forward(operands._replace(**changed), ctx.options)[0],)

            grads = higher_order.gradients_through(formula, operands[:4], (dout,))
        else:
            wanted = [x for x in ctx.points if x is not None and x.requires_grad]
            with _running():
                found = iter(torch.autograd.grad(ctx.out, wanted, dout, retain_graph=True))
            grads = [next(found) if x is not None and x.requires_grad else None for x in ctx.points]
        return (*grads, None, None)
