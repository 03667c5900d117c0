"""The public functions of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime import checks, hints, overlap
from .. import dispatch
from . import BACKENDS, call
from .arguments import documents, documents_of_rows, four_dimensional, heads_first, understood
from .call import Scalars
from .problem import BHLD, BLHD, Causal, Documents, Layout, Operands, Weights

# A NamedTuple of all its fields, without the call of its own constructor (0.2 us of a small call).
_new = tuple.__new__

__all__ = [
    "attention",
    "attention_backends",
    "attention_varlen",
    "merge_attention",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    chunk: int | None = None,
    prefix_lengths: Tensor | None = None,
    document_ids: Documents | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    layout: Layout = "bhld",
    return_lse: bool = False,
    return_weights: Weights = None,
    out: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Any:
    """softmax(scale * q k^T + ...) v with every mask, fused (Vaswani et al. 2017, equation 1).

    Every operand may be combined with every other. In plain PyTorch::

        s = scale * q @ k.transpose(-2, -1)                          # (B, H, Lq, Lk), float32
        s = softcap * tanh(s / softcap)                              # if softcap
        s = s - alibi_slopes[:, None, None] * abs(i + Lk - Lq - j)   # if alibi_slopes
        s = s + bias                                                 # if bias
        s = where(visible, s, -inf)
        s = cat([s, sinks[:, None, None]], -1)                       # if sinks, and v a row of 0
        out = dropout(softmax(s, -1), dropout_p) @ v                 # 0 where a row sees no key

    Query i sees key j iff all of these hold, with d = p - j, where the query's position is p = i
    if `causal` is True or "upper_left", else p = i + Lk - Lq:

    * `causal`: d >= 0, or j < `prefix_lengths[b]`. "upper_left" (or True) aligns the first query
      with the first key, as torch's `is_causal` does; "lower_right" the last with the last, as
      decoding wants.
    * `window` (left, right): -right <= d <= left, or j < `prefix_lengths[b]`; -1 lifts a limit.
    * `chunk`: floor(p / chunk) == floor(j / chunk).
    * `document_ids`: `query_ids[b, i] == key_ids[b, j]`.
    * `key_padding_mask`: `key_padding_mask[b, j]`.
    * `key_lengths`: j < `key_lengths[b]`. A padding mask by length: it moves no diagonal.
    * `mask`: `mask[b, h, i, j]`.
    * `bias`: `bias[b, h, i, j]` is not -inf.

    NaN or infinity in a key or value that no query of its batch element sees has no effect.

    Args:
        q: (B, H, Lq, D), float32, float16, bfloat16 or float64; any strides.
        k: (B, Hkv, Lk, D); H must be a multiple of Hkv. Query head h reads head h // (H // Hkv).
        v: (B, Hkv, Lk, Dv). A batch of 1 in q, k or v stands for all B; its gradient is their sum.
        chunk: at least 1; keys of the query's own chunk are seen (Llama 4's local attention).
        prefix_lengths: (B,) int64, in [0, Lk], checked as `key_lengths`: keys before it are exempt
            from `causal` and `window` (a prefix language model), one of which must be given.
        document_ids: int32 or int64, (B, L) if Lq = Lk, or a pair (query_ids (B, Lq), key_ids
            (B, Lk)). Ids in any order; those in long runs cost the least.
        key_padding_mask: (B, Lk) bool, True = visible.
        key_lengths: (B,) int64, in [0, Lk]. Checked on the CPU; elsewhere, where a look would cost
            a wait, a longer one means Lk and a negative one 0.
        mask: bool, True = visible, broadcastable to (B, H, Lq, Lk). Nothing is expanded. One longer
            than the keys is refused, as in torch: `mask[..., :Lk]` is a view. So with `bias`.
        bias: float32 or q's dtype, broadcastable to (B, H, Lq, Lk); its gradient has its shape.
        alibi_slopes: (H,) float32, the m of Press et al. 2022. Where their gradient is wanted, they
            are worked in as a bias of (H, Lq, Lk).
        sinks: (H,) float: the score of one more key, whose value is 0 (Xiao et al. 2023). They are
            worked in by lse, so that every backend has them. lse counts them.
        softcap: positive; 0 or None for none.
        scale: finite; 1/sqrt(D) if None.
        dropout_p: probability in [0, 1] of dropping an attention probability; the kept ones are
            divided by 1 - dropout_p. Applied whenever it is not 0.
        dropout_rng: (2,) int64, seed and offset of the dropout. One pair gives the same mask on
            every backend. Drawn from torch's generator if None.
        layout: "bhld" as above, or "blhd": q, k, v, out are (B, Lq, H, D), (B, Lk, Hkv, D), ...,
            as a projection leaves them. Nothing is copied for either. All else stays as it is.
        return_lse: return the logsumexp of each row of scores as well: natural logarithm, float32
            (float64 for float64), (B, H, Lq), -inf for a row that sees no key; differentiable.
        return_weights: return the attention probabilities after dropout as well: "per_head"
            (B, H, Lq, Lk) or "average" over heads (B, 1, Lq, Lk); differentiable.
        out: write the output here instead of into a new tensor, in the same layout; no gradient may
            be wanted.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        out (B, H, Lq, Dv), or (B, Lq, H, Dv), new and contiguous; or a tuple of out and then lse
        and weights, those that were asked for.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    if unknown:
        hints.refuse_unknown("attention", unknown, attention.__annotations__)
    if layout != BHLD:
        q, k, v, out = heads_first(layout, q=q, k=k, v=v, out=out)
    if mask is not None or bias is not None:
        mask, bias, causal = understood(q, k, mask, bias, causal)
    query_ids = key_ids = None
    if document_ids is not None:
        query_ids, key_ids = documents(document_ids, q, k)
    operands = _new(
        Operands,
        (
            q,
            k,
            v,
            None if bias is None else four_dimensional("bias", bias),
            None if mask is None else four_dimensional("mask", mask),
            key_padding_mask,
            key_lengths,
            alibi_slopes,
            None,
            None,
            dropout_rng if dropout_p else None,
            sinks,
            query_ids,
            key_ids,
            prefix_lengths,
        ),
    )
    scalars = _new(
        Scalars,
        (
            causal,
            window,
            softcap,
            scale,
            dropout_p,
            return_weights,
            backend,
            None,
            None,
            return_lse,
            layout,
            chunk,
        ),
    )
    if out is not None:
        _check_out(out, operands)
    result, lse, weights = call.run(operands, scalars, out)
    if layout != BHLD:
        result = result.transpose(1, 2)
    if not return_lse and return_weights is None:
        return result
    extras = (lse,) if return_lse else ()
    return (result, *extras) if return_weights is None else (result, *extras, weights)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    chunk: int | None = None,
    prefix_lengths: Tensor | None = None,
    document_ids: Documents | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Any:
    """Attention of sequences of unequal length, packed one after the other without padding.

    Sequence n owns the rows `cu_seqlens_q[n] : cu_seqlens_q[n + 1]` of q and likewise of k and v.
    In plain PyTorch::

        for n in range(N):
            rows_q = slice(cu_seqlens_q[n], cu_seqlens_q[n + 1])
            rows_k = slice(cu_seqlens_k[n], cu_seqlens_k[n + 1])
            out[rows_q] = attention(q[rows_q], k[rows_k], v[rows_k])    # heads moved to the front

    Rows past the last sequence get output 0 and lse -inf, and are never read.

    Args:
        q: (Tq, H, D). k: (Tk, Hkv, D). v: (Tk, Hkv, Dv). Any strides.
        cu_seqlens_q, cu_seqlens_k: (N + 1,) int32, cumulative lengths, starting at 0. Checked on
            the CPU; elsewhere the kernels stay inside the tensors whatever they hold.
        max_seqlen_q, max_seqlen_k: at least the longest length; numbers, so that nothing has to be
            read back from a device.
        causal, window, chunk, alibi_slopes, sinks, softcap, scale, dropout_p, dropout_rng, backend:
            as in `attention`; positions count from the start of each sequence.
        prefix_lengths: (N,) int64, in [0, max_seqlen_k].
        document_ids: (T,) if Tq = Tk, or a pair ((Tq,), (Tk,)): documents within the sequences.
        mask, bias: as in `attention`, broadcastable to (N, H, max_seqlen_q, max_seqlen_k): element
            (n, h, i, j) is of query i and key j of sequence n, and none beyond its lengths is read.
        return_lse: return the logsumexp of each row, (H, Tq), as well.

    Returns:
        out (Tq, H, Dv), or (out, lse).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.

    Shape legend: N sequences, Tq and Tk rows in all, H and Hkv heads, D and Dv head sizes.
    """
    if unknown:
        hints.refuse_unknown("attention_varlen", unknown, attention_varlen.__annotations__)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.expect_rank(name, tensor, 3, "(T, heads, head size)")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.expect_tensor(name, tensor)
    query_ids = key_ids = None
    if document_ids is not None:
        query_ids, key_ids = documents_of_rows(document_ids, q, k)
    operands = Operands(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        bias=None if bias is None else four_dimensional("bias", bias),
        mask=None if mask is None else four_dimensional("mask", mask),
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_rng=dropout_rng if dropout_p else None,
        sinks=sinks,
        query_documents=query_ids,
        key_documents=key_ids,
        prefix_lengths=prefix_lengths,
    )
    scalars = Scalars(
        causal,
        window,
        softcap,
        scale,
        dropout_p,
        None,
        backend,
        max_seqlen_q,
        max_seqlen_k,
        return_lse,
        BLHD,
        chunk,
    )
    out, lse, _ = call.run(operands, scalars)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse and lse is not None else out


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over two disjoint sets of keys.

    In plain PyTorch, exactly as it is computed::

        lse = logaddexp(lse1, lse2)
        out = out1 * exp(lse1 - lse)[..., None] + out2 * exp(lse2 - lse)[..., None]

    Rows that see no key in either set stay output 0, lse -inf. Differentiable.

    Args:
        out1, out2: (..., L, Dv).
        lse1, lse2: (..., L), natural logarithm, as `attention(..., return_lse=True)` gives them.

    Returns:
        out (..., L, Dv) in out1's dtype and lse (..., L).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    checks.expect_tensor("out1", out1)
    checks.expect_shape("out2", out2, tuple(out1.shape), "that of `out1`")
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        checks.expect_shape(name, lse, tuple(out1.shape[:-1]), "out1.shape[:-1]")
        checks.expect_dtype(name, lse, (torch.float32, torch.float64))
    # logaddexp by hand: torch's has NaN gradients where both sides are -inf.
    peak = torch.maximum(lse1, lse2).detach()
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weight1, weight2 = torch.exp(lse1 - peak), torch.exp(lse2 - peak)
    total = weight1 + weight2
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, peak + torch.log(total))
    out = out1 * (weight1 / total)[..., None] + out2 * (weight2 / total)[..., None]
    return out.to(out1.dtype), lse


def attention_backends() -> tuple[str, ...]:
    """Names of the attention backends, the preferred one first."""
    return tuple(backend.NAME for backend in BACKENDS)


def explain_attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> dispatch.Explanation:
    """`explain` of `attention`; it runs nothing."""
    inner = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    inner |= {"query_documents", "key_documents"}
    known = {"out", "document_ids", *Operands._fields, *Scalars._fields} - inner
    for name in arguments:
        if name not in known:
            hints.refuse_unknown("explain", {name: None}, known)
    layout = arguments.get("layout", BHLD)
    if layout != BHLD:
        q, k, v, _ = heads_first(layout, q=q, k=k, v=v, out=None)
    mask, bias, causal = (arguments.get(name) for name in ("mask", "bias", "causal"))
    if mask is not None or bias is not None:
        mask, bias, causal = understood(q, k, mask, bias, causal or False)
        arguments.update(mask=mask, bias=bias, causal=causal)
    if arguments.get("document_ids") is not None:
        query_ids, key_ids = documents(arguments["document_ids"], q, k)
        arguments.update(query_documents=query_ids, key_documents=key_ids)
    for name in ("bias", "mask"):
        if arguments.get(name) is not None:
            arguments[name] = four_dimensional(name, arguments[name])
    operands = Operands(q, k, v, **{name: arguments.get(name) for name in Operands._fields[3:]})
    scalars = Scalars(**{n: arguments[n] for n in Scalars._fields if n in arguments})
    return dispatch.explain(BACKENDS, call.asked_of_backends(operands, scalars), scalars.backend)


def _check_out(out: Tensor, operands: Operands) -> None:
    checks.expect_tensor("out", out)
    for name, tensor in zip(("q", "k", "v"), operands[:3], strict=True):
        checks.expect_rank(name, tensor, 4, "(B, heads, L, head size)")
    q, _, v = call.broadcast(operands)[:3]
    checks.expect_shape("out", out, (*q.shape[:3], v.shape[3]), "(B, H, Lq, Dv)")
    checks.expect_dtype("out", out, (q.dtype,))
    checks.expect_device("out", out, q.device)
    overlap.expect_writable("out", out)
    overlap.expect_apart("out", out, operands)
    checks.expect_no_gradient("out", out, any(getattr(x, "requires_grad", False) for x in operands))
