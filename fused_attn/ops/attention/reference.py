"""Attention in plain PyTorch: the definition that every kernel is tested against.

It runs everywhere and differentiates to any order. Memory is O(H Lq Lk) a batch element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import philox
from .problem import AVERAGE, LOWER_RIGHT, NO_WEIGHTS, NONE, AttentionProblem, Operands, Options

NAME = "reference"
IS_FORMULA = True
OPERANDS = GRADIENTS = frozenset(Operands._fields)


def why_not(problem: AttentionProblem) -> list[str]:
    return []


def forward(
    operands: Operands,
    options: Options,
    weights: int = NO_WEIGHTS,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, lse and, where asked for, weights.

    Vaswani et al. 2017, equation 1, with the score of `fused_attn.attention`. Scores and softmax
    are float32 (float64 for float64), or `compute_dtype`: what plain PyTorch does in half precision
    is the yardstick of the tests. A row that sees no key gives output 0, weights 0, lse -inf.

    Returns:
        out (B, H, Lq, Dv) in q's dtype, lse (B, H, Lq), weights (B, H, Lq, Lk), averaged
        (B, 1, Lq, Lk), or None. Packed operands give packed results.
    """
    if compute_dtype is None:
        compute_dtype = torch.float64 if operands.q.dtype == torch.float64 else torch.float32
    if operands.cu_seqlens_q is not None:
        return _forward_packed(operands, options, compute_dtype)
    shift = operands.k.shape[2] - operands.q.shape[2]
    return _forward_dense(operands, options, weights, shift, compute_dtype)


def relative_to(lse: Tensor, operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """What the gradients are those of where lse is given, maybe that of more keys than these.

    With P = exp(scores - lse), which is constant in lse: out = P V after dropout, and the sum of
    each row of P. For dout, and dlse - rowsum(dout * out) as the gradient of the sums, their
    gradients are those of attention (Dao 2023, FlashAttention-2, algorithm 2).

    Args:
        lse: (B, H, Lq), -inf for rows that see no key.

    Returns:
        out (B, H, Lq, Dv) in q's dtype and sums (B, H, Lq).
    """
    compute = torch.float64 if operands.q.dtype == torch.float64 else torch.float32
    shift = operands.k.shape[2] - operands.q.shape[2]
    s, v, _ = _visible_scores(operands, options, shift, compute)
    nothing = (lse == -torch.inf)[..., None]
    p = torch.exp(s - torch.where(nothing, 0.0, lse[..., None]))
    p = torch.where(nothing, 0.0, p)
    out = _dropout(p, operands.dropout_rng, options.dropout_p) @ v
    # Who sees no key may have any gradient, and 0 * NaN is NaN.
    out, sums = (torch.where(nothing, 0.0, x) for x in (out, p.sum(dim=-1, keepdim=True)))
    return out.to(operands.q.dtype), sums[..., 0]


def _visible_scores(
    operands: Operands, options: Options, shift: int | Tensor, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scores, -inf where hidden, v as they want it, and what is visible."""
    q, k, v = operands.q, operands.k, operands.v
    visible = visible_pairs(operands, options, shift)
    if visible is not None:
        # A key that no query sees may hold NaN, and 0 * NaN is NaN: take it out first.
        seen = visible.expand(q.shape[0], -1, -1, -1).flatten(1, 2).any(dim=1)
        seen = seen[:, None, :, None]
        k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)
    group = q.shape[1] // k.shape[1]
    k = k.to(compute).repeat_interleave(group, dim=1)
    v = v.to(compute).repeat_interleave(group, dim=1)
    s = _scores(q.to(compute), k, operands, options, shift)
    if visible is not None:
        s = s.masked_fill(~visible, -torch.inf)
    return s, v, visible


def _forward_dense(
    operands: Operands,
    options: Options,
    weights: int,
    shift: int | Tensor,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    q = operands.q
    s, v, visible = _visible_scores(operands, options, shift, compute)
    p, lse = _softmax(s, operands.sinks)
    p = _dropout(p, operands.dropout_rng, options.dropout_p)
    out = (p @ v).to(q.dtype)
    if visible is not None or operands.bias is not None:
        # Who sees no key may have any gradient, and 0 * NaN is NaN.
        out = torch.where((s.detach() == -torch.inf).all(-1, keepdim=True), 0.0, out)
    if compute in (torch.float16, torch.bfloat16):
        lse = lse.float()
    if weights == NO_WEIGHTS:
        return out, lse, None
    if weights == AVERAGE:
        p = p.mean(dim=1, keepdim=True)
    return out, lse, p.to(q.dtype)


def _scores(
    q: Tensor, k: Tensor, operands: Operands, options: Options, shift: int | Tensor
) -> Tensor:
    s = options.scale * (q @ k.transpose(-2, -1))
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    if operands.alibi_slopes is not None:
        distance = alibi_distance(operands, shift)
        s = s - operands.alibi_slopes[:, None, None].to(s.dtype) * distance
    if operands.bias is not None:
        s = s + operands.bias.to(s.dtype)
    return s


def alibi_distance(operands: Operands, shift: int | Tensor) -> Tensor:
    """|i + shift - j|, broadcastable to (B, H, Lq, Lk): what ALiBi's slopes are multiplied by."""
    q, k = operands.q, operands.k
    return _diagonal(q.shape[2], k.shape[2], shift, q.device).abs()


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(s) over the last dimension and its logsumexp; 0 and -inf where all of s is -inf.

    A sink is one more score of each row, whose probability nobody asks for.
    """
    sink = None if sinks is None else sinks.to(s.dtype)[:, None, None]
    if s.shape[-1] == 0:
        lse = s.new_full(s.shape[:-1], -torch.inf)
        return s, lse if sink is None else lse.masked_fill(lse == lse, 0.0) + sink[..., 0]
    peak = s.detach().amax(dim=-1, keepdim=True)
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    e = torch.exp(s - peak)
    total = e.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, peak + torch.log(total))
    return e / total, lse.squeeze(-1)


def _dropout(p: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    if rng is None or dropout_p == 0.0:
        return p
    if dropout_p == 1.0:
        return torch.zeros_like(p) * p
    return torch.where(keep_mask(rng, dropout_p, p.shape), p / (1.0 - dropout_p), 0.0)


def keep_mask(rng: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
    """Which attention probabilities survive the dropout: bool of `shape` (B, H, Lq, Lk)."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    device = rng.device
    row = torch.arange(seqlen_q, device=device)[:, None]
    head = torch.arange(batch * num_heads, device=device)[:, None, None]
    quad = torch.arange((seqlen_k + 3) // 4, device=device)
    offset = rng[1] & 0xFFFFFFFF
    drawn = philox.words((quad, row, head, offset), rng[0]).flatten(-2)
    drawn = drawn[..., :seqlen_k].reshape(batch, num_heads, seqlen_q, seqlen_k)
    return drawn >= philox.threshold(dropout_p)


def _diagonal(seqlen_q: int, seqlen_k: int, shift: int | Tensor, device: torch.device) -> Tensor:
    """I + shift - j, broadcastable to (B, H, Lq, Lk)."""
    row = torch.arange(seqlen_q, device=device)[:, None]
    return row + shift - torch.arange(seqlen_k, device=device)


def visible_pairs(operands: Operands, options: Options, shift: int | Tensor) -> Tensor | None:
    """Which (query, key) pairs may meet: bool, broadcastable to (B, H, Lq, Lk), or None for all.

    They may where all terms hold, with p = i + shift the position of query i:

    * -right <= p - j <= left (causal: right = 0), or j < prefix_lengths[b]
    * floor(p / chunk) == floor(j / chunk)
    * query_documents[b, i] == key_documents[b, j]
    * key_padding_mask[b, j], j < key_lengths[b], mask[b, h, i, j], bias[b, h, i, j] != -inf
    """
    seqlen_q, seqlen_k = operands.q.shape[2], operands.k.shape[2]
    device = operands.q.device
    lower_right = options.causal in (NONE, LOWER_RIGHT)
    shift = shift if lower_right else 0
    terms = _band(operands, options, shift)
    if options.chunk:
        row = torch.arange(seqlen_q, device=device)[:, None] + shift
        chunk = torch.div(row, options.chunk, rounding_mode="floor")
        terms.append(chunk == torch.arange(seqlen_k, device=device) // options.chunk)
    if operands.query_documents is not None and operands.key_documents is not None:
        ids = operands.query_documents[:, None, :, None]
        terms.append(ids == operands.key_documents[:, None, None, :])
    if operands.key_padding_mask is not None:
        terms.append(operands.key_padding_mask[:, None, None, :])
    if operands.key_lengths is not None:
        position = torch.arange(seqlen_k, device=device)
        terms.append((position < operands.key_lengths[:, None])[:, None, None, :])
    if operands.mask is not None:
        terms.append(operands.mask)
    if operands.bias is not None:
        terms.append(operands.bias != -torch.inf)
    if not terms:
        return None
    visible = terms[0]
    for term in terms[1:]:
        visible = visible & term
    # All four dimensions, the last two in full: callers reduce over them.
    visible = visible.expand(*visible.shape[:-2], seqlen_q, seqlen_k)
    return visible[(None,) * (4 - visible.dim())]


def _band(operands: Operands, options: Options, shift: int | Tensor) -> list[Tensor]:
    """Causal and window, but for the keys of a prefix: no term, or one."""
    if options.causal == NONE and options.window_left < 0 and options.window_right < 0:
        return []
    seqlen_k, device = operands.k.shape[2], operands.q.device
    distance = _diagonal(operands.q.shape[2], seqlen_k, shift, device)
    terms = []
    if options.causal != NONE:
        terms.append(distance >= 0)
    if options.window_left >= 0:
        terms.append(distance <= options.window_left)
    if options.window_right >= 0:
        terms.append(-distance <= options.window_right)
    band = terms[0]
    for term in terms[1:]:
        band = band & term
    if operands.prefix_lengths is not None:
        prefix = torch.arange(seqlen_k, device=device) < operands.prefix_lengths[:, None]
        band = band | prefix[:, None, None, :]
    return [band]


def _forward_packed(
    operands: Operands, options: Options, compute: torch.dtype
) -> tuple[Tensor, Tensor, None]:
    """Spread the sequences over a padded batch, run the dense formula, gather what is real."""
    assert operands.cu_seqlens_q is not None
    assert operands.cu_seqlens_k is not None
    rows_q, lengths_q = _padded_rows(operands.cu_seqlens_q, options.max_seqlen_q)
    rows_k, lengths_k = _padded_rows(operands.cu_seqlens_k, options.max_seqlen_k)
    # Rows that fill up a sequence count as no query that might see a key.
    position = torch.arange(options.max_seqlen_q, device=rows_q.device)
    real = (position < lengths_q[:, None])[:, None, :, None]
    dense = Operands(
        q=_spread(operands.q, rows_q),
        k=_spread(operands.k, rows_k),
        v=_spread(operands.v, rows_k),
        key_lengths=lengths_k,
        alibi_slopes=operands.alibi_slopes,
        dropout_rng=operands.dropout_rng,
        sinks=operands.sinks,
        bias=operands.bias,
        mask=real if operands.mask is None else operands.mask & real,
        query_documents=_spread_ids(operands.query_documents, rows_q),
        key_documents=_spread_ids(operands.key_documents, rows_k),
        prefix_lengths=operands.prefix_lengths,
    )
    shift = (lengths_k - lengths_q)[:, None, None, None]
    out, lse, _ = _forward_dense(dense, options, NO_WEIGHTS, shift, compute)
    total = operands.q.shape[2]
    row = torch.arange(total, device=operands.q.device)
    sequence = torch.bucketize(row, operands.cu_seqlens_q[1:].long(), right=True)
    # Rows past the last sequence belong to nobody: they see no key.
    owned = sequence < lengths_q.shape[0]
    if lengths_q.shape[0] == 0 or options.max_seqlen_q == 0:
        empty = operands.q.new_zeros(1, operands.q.shape[1], total, operands.v.shape[3])
        return empty, lse.new_full((1, operands.q.shape[1], total), -torch.inf), None
    sequence = sequence.clamp(max=lengths_q.shape[0] - 1)
    local = (row - operands.cu_seqlens_q[sequence].long()).clamp(0, options.max_seqlen_q - 1)
    out = torch.where(owned[:, None, None], out[sequence, :, local], 0.0)
    lse = torch.where(owned[:, None], lse[sequence, :, local], -torch.inf)
    return out.transpose(0, 1)[None], lse.transpose(0, 1)[None], None


def _padded_rows(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Row of the packed tensor for each (sequence, position), and each sequence's length."""
    start = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - start
    position = torch.arange(max_seqlen, device=cu_seqlens.device)
    last = (lengths - 1).clamp(min=0)
    return start[:, None] + torch.minimum(position, last[:, None]), lengths


def _spread_ids(packed: Tensor | None, rows: Tensor) -> Tensor | None:
    """(1, T) and rows (B, L) -> (B, L)."""
    return None if packed is None else _spread(packed[:, None, :, None], rows)[:, 0, :, 0]


def _spread(packed: Tensor, rows: Tensor) -> Tensor:
    """(1, H, T, D) and rows (B, L) -> (B, H, L, D)."""
    tokens = packed[0].transpose(0, 1)
    if tokens.shape[0] == 0:
        return packed.new_zeros(rows.shape[0], packed.shape[1], rows.shape[1], packed.shape[3])
    return tokens[rows.clamp(max=tokens.shape[0] - 1)].transpose(1, 2)
