"""torch's scaled_dot_product_attention, each of its paths forced by name; packed batches padded."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..operations.attention import Attention
from ..operations.packed import Packed
from ..problem import Prepared, leaves
from .peer import Peer, needs_gpu

BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# More scores than this in memory, and the plain formula is no peer any more.
MOST_SCORE_BYTES = 16 * 2**30


def additive_or_bool_mask(problem: Attention, tensors: dict[str, Tensor]) -> Tensor | None:
    """torch's `attn_mask` for everything that `is_causal` cannot say."""
    q, k = tensors["q"], tensors["k"]
    if problem.variant == "padding":
        return tensors["key_padding_mask"][:, None, None, :]
    if problem.variant in ("mask", "bias"):
        return tensors[problem.variant]
    distance = (
        torch.arange(q.shape[2], device=q.device)[:, None]
        + (k.shape[2] - q.shape[2])
        - torch.arange(k.shape[2], device=q.device)
    )
    if problem.variant == "window" and problem.window is not None:
        return (distance >= 0) & (distance <= problem.window[0])
    if problem.variant == "alibi":
        return (-tensors["alibi_slopes"][:, None, None] * distance.abs()).to(q.dtype)[None]
    if problem.variant == "causal" and q.shape[2] != k.shape[2]:
        return distance >= 0
    return None


def _attention(
    backend: SDPBackend | None, problem: Attention, tensors: dict[str, Tensor]
) -> Prepared:
    q, k, v = (tensors[name] for name in "qkv")
    mask = additive_or_bool_mask(problem, tensors)
    causal = problem.variant == "causal" and mask is None
    run = functools.partial(
        scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal,
        enable_gqa=problem.heads != problem.heads_kv,
    )  # fmt: skip
    return Prepared(_forced(backend, run), leaves(problem, tensors))


def _forced(backend: SDPBackend | None, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    if backend is None:
        return run

    def forced() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return forced


def _packed(backend: SDPBackend, problem: Packed, tensors: dict[str, Tensor]) -> Prepared:
    """The same sequences as a padded batch: nobody is charged for padding or unpadding."""
    visible = torch.arange(problem.seqlen) < torch.tensor(problem.lengths)[:, None]
    visible = visible.to(problem.device)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(*visible.shape, *x.shape[1:])
        padded[visible] = x.detach()
        return padded.transpose(1, 2).contiguous()

    q, k, v = (
        pad(tensors[name]).requires_grad_(tensors[name].requires_grad) for name in ("q", "k", "v")
    )
    mask = visible[:, None, None, :]
    if problem.variant == "causal":
        mask = mask & torch.ones(problem.seqlen, problem.seqlen, device=mask.device).tril().bool()
    run = functools.partial(
        scaled_dot_product_attention, q, k, v, attn_mask=mask,
        enable_gqa=problem.heads != problem.heads_kv,
    )  # fmt: skip
    return Prepared(
        _forced(backend, run),
        leaves(problem, {"q": q, "k": k, "v": v}),
        arrange=pad,
        restore=lambda name, x: x.transpose(1, 2)[visible],
    )


def _limits(name: str, problem: Attention | Packed) -> list[str]:
    reasons = []
    masked = problem.operation == "packed" or problem.variant not in ("full", "causal")
    if name in ("sdpa-cudnn", "sdpa-efficient"):
        reasons += needs_gpu(problem)
    if name == "sdpa-flash" and problem.device == "cuda" and masked:
        reasons.append("takes no mask on a GPU")
    if problem.variant == "softcap":
        reasons.append("has no softcap")
    if name == "sdpa-math":
        reasons += too_many_scores(problem)
    return reasons


def too_many_scores(problem: Attention | Packed) -> list[str]:
    """Why the plain formula, which keeps every score, is not asked."""
    columns = problem.columns()
    count = 1
    for column in ("batch", "heads", "seqlen_q", "seqlen_k"):
        count *= int(str(columns[column]))
    if count * 4 > MOST_SCORE_BYTES:
        return [f"its scores would take {count * 4 / 2**30:.0f} GiB"]
    return []


PEERS = (
    *(
        Peer(
            name,
            {
                "attention": functools.partial(_attention, backend),
                "packed": functools.partial(_packed, backend),
            },
            limits=functools.partial(_limits, name),
        )
        for name, backend in BACKENDS.items()
    ),
    Peer("sdpa", {"call": functools.partial(_attention, None)}),
)
