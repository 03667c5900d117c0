"""The public function, with the arguments of `torch.nn.attention.flex_attention.flex_attention`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.attention import flex_attention as torch_flex

from ..ops import dispatch
from ..ops.attention.api import attention
from ..runtime import autocast, checks, sequence, subclasses
from . import agreement, cache, compiled, known, tiles
from .call import Call
from .expression import MASK_INPUTS, SCORE_INPUTS, CannotRead, Expression

_TORCHS = torch_flex.flex_attention  # somebody may put ours under this name
_HUGE = 1 << 30  # torch's size of the only block of a mask that hides nothing


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Attention whose scores and mask are Python functions; torch's interface (Dong et al. 2024).

    In plain PyTorch, for every batch element b, head h, query i and key j::

        score = score_mod(scale * (query @ key.mT)[b, h, i, j], b, h, i, j)
        score = where(mask_mod(b, h, i, j), score, -inf)
        out = softmax(score) @ value

    The functions are read once, not called for every pair. Masks and changes that `attention` has
    operands for (causal, windows, documents, prefixes, chunks, lengths, ALiBi, softcap, and their
    conjunctions) run as those. Any other runs inside of the CPU kernels' loop, or block by block
    where no kernel can (`explain` says which), forward and backward, with gradients of what the
    functions captured; (Lq, Lk) is never held at once.

    Under torch.compile torch's own function is called instead.

    Args:
        query: (B, H, Lq, E). key: (B, Hkv, Lk, E). value: (B, Hkv, Lk, Ev).
        score_mod: (score, b, h, q_idx, kv_idx) -> score, of torch operations that make one number
            of one number, and indices into captured tensors.
        block_mask: a `BlockMask`, walked as it is; or a mask function of (b, h, q_idx, kv_idx).
        scale: 1/sqrt(E) if None.
        enable_gqa: allow H to be a multiple of Hkv.
        return_lse: return the logsumexp of each row, (B, H, Lq), as well.
        kernel_options: of torch's kernels; taken, and without meaning here.
        return_aux: an `AuxRequest` of torch's: return an `AuxOutput` as well.

    Returns:
        out (B, H, Lq, Ev) in query's dtype; or (out, lse), or (out, `AuxOutput`).

    Raises:
        TypeError, ValueError: an argument is wrong; a function cannot be read (the message names
            the operation and the line), or captured a tensor of another device.
    """
    sequence.expect_whole("flex_attention", "`attention` by `causal`, `window`, `document_ids`")
    if is_compiling():
        return _TORCHS(
            query,
            key,
            value,
            score_mod,
            block_mask,
            scale,
            enable_gqa,
            return_lse,
            kernel_options,
            return_aux=return_aux,
        )
    if return_lse and return_aux is not None:
        raise ValueError("`return_lse` must be False where `return_aux` is given")
    wants_lse = return_lse or (return_aux is not None and return_aux.lse)
    wants_peak = return_aux is not None and return_aux.max_scores

    def run(q: Any, k: Any, v: Any, score: Any, mask: Any, around: Any = None) -> _Results:
        return _attend(q, k, v, score, mask, scale, enable_gqa, wants_lse, wants_peak, around)

    sharded = subclasses.door_of((query, key, value))
    if sharded is not None:
        out, lse, peak = sharded.flex_attention(run, (query, key, value), score_mod, block_mask)
    else:
        out, lse, peak = run(query, key, value, score_mod, block_mask)
    if return_aux is None:
        return (out, lse) if return_lse else out
    return out, torch_flex.AuxOutput(lse=lse if return_aux.lse else None, max_scores=peak)


_Results: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None]"


def _attend(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Any,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    wants_lse: bool,
    wants_peak: bool,
    around: Callable[[Tensor], Tensor] | None,
) -> _Results:
    """out, lse and the largest scores, as far as wanted.

    Args:
        around: put around each tensor that the change of scores captured.
    """
    dtype = autocast.dtype_for(query)
    if dtype is not None:
        given = (query, key, value)  # what is no tensor is for the checks to refuse
        query, key, value = (x.to(dtype) if isinstance(x, Tensor) else x for x in given)
    key, value = _check(query, key, value, enable_gqa, block_mask)
    scale = checks.expect_finite("scale", query.shape[-1] ** -0.5 if scale is None else scale)
    score, mask = _read_both(score_mod, block_mask, query)
    if around is not None and score is not None:
        score = dataclasses.replace(score, captured=list(map(around, score.captured)))
    operands = _operands(score, mask, block_mask, query, key)
    lse = None
    if operands is not None:
        found = attention(query, key, value, scale=scale, return_lse=wants_lse, **operands)
        out, lse = found if wants_lse else (found, None)
    else:
        call = _call(score, mask, block_mask, scale, query, key)
        if dispatch.is_watched():
            dispatch.note(f"runs {compiled.way(call, query, key, value)}")
        out, lse = tiles.attend(call, query, key, value)
    peak = None
    if wants_peak:
        peak = tiles.max_scores(_call(score, mask, block_mask, scale, query, key), query, key)
    return out, lse, peak


def _read_both(
    score_mod: Any, block_mask: Any, query: Tensor
) -> tuple[Expression | None, Expression | None]:
    """The change of scores and the mask."""
    mask_mod = getattr(block_mask, "mask_mod", block_mask)
    if mask_mod is torch_flex.noop_mask:
        mask_mod = None
    score = _read(score_mod, SCORE_INPUTS, "score_mod", query)
    return score, _read(mask_mod, MASK_INPUTS, "mask_mod", query)


def _check(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, block_mask: Any
) -> tuple[Tensor, Tensor]:
    """key and value, a batch of 1 expanded."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.expect_tensor(name, tensor)
        checks.expect_rank(name, tensor, 4, "(B, heads, L, head size)")
    checks.expect_dtype("query", query, checks.FLOAT_DTYPES)
    for name, tensor in (("key", key), ("value", value)):
        checks.expect_dtype(name, tensor, (query.dtype,))
        checks.expect_device(name, tensor, query.device)
    batch, heads, _, size = query.shape
    heads_kv, seqlen_k = key.shape[1:3]
    if key.shape[0] == value.shape[0] == 1 != batch:
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    checks.expect_shape("key", key, (batch, heads_kv, seqlen_k, size), "(B, Hkv, Lk, E)")
    expected = (batch, heads_kv, seqlen_k, value.shape[3])
    checks.expect_shape("value", value, expected, "(B, Hkv, Lk, Ev)")
    if heads != heads_kv and not enable_gqa:
        raise ValueError(
            f"`key` must have the {heads} heads of `query`, got {heads_kv}; "
            "grouped heads need enable_gqa=True"
        )
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(f"`key` must have a number of heads that divides {heads}, got {heads_kv}")
    if block_mask is not None and hasattr(block_mask, "kv_num_blocks"):
        _check_block_mask(block_mask, query, seqlen_k)
    elif block_mask is not None and not callable(block_mask):
        raise TypeError(
            "`block_mask` must be a BlockMask or a mask function, "
            f"got {checks.type_name(block_mask)}"
        )
    return key, value


def _check_block_mask(block_mask: Any, query: Tensor, seqlen_k: int) -> None:
    batch, heads, seqlen_q, _ = query.shape
    checks.expect_device("block_mask", block_mask.kv_num_blocks, query.device)
    if min(block_mask.BLOCK_SIZE) >= _HUGE:
        return
    *leading, rows, keys = block_mask.shape
    if (rows, keys) != (seqlen_q, seqlen_k):
        raise ValueError(
            f"`block_mask` must be made for (Lq, Lk) = {(seqlen_q, seqlen_k)}, "
            f"got one for {(rows, keys)}"
        )
    for name, mine, whole in zip(("B", "H"), leading, (batch, heads), strict=True):
        if mine not in (1, whole):
            raise ValueError(f"`block_mask` must have {name} = 1 or {whole}, got {mine}")


def _read(
    function: Callable[..., Any] | None, names: tuple[str, ...], what: str, query: Tensor
) -> Expression | None:
    if function is None:
        return None
    if not callable(function):
        raise TypeError(f"`{what}` must be a function, got {checks.type_name(function)}")
    try:
        expression = cache.expression_of(function, names, what, query)
    except CannotRead as error:
        raise ValueError(str(error)) from None
    for tensor in expression.captured:
        if tensor.device != query.device and tensor.dim() > 0:
            raise ValueError(
                f"`{what}` captured a tensor {tuple(tensor.shape)} on {tensor.device}, "
                f"`query` is on {query.device}"
            )
    return expression


def _operands(
    score: Expression | None, mask: Expression | None, block_mask: Any, q: Tensor, k: Tensor
) -> dict[str, Any] | None:
    """Arguments of `attention` for both functions; None where there are none."""
    seen = known.Mask() if mask is None else known.mask_of(mask)
    change = known.Score() if score is None else known.score_of(score)
    if seen is None or change is None or change.added:
        return None
    operands = seen.operands(q, k)
    if operands is None or not agreement.agrees(block_mask, mask, q, k):
        return None
    if change.softcap is not None:
        operands["softcap"] = change.softcap
    slopes = change.slopes
    if slopes is not None:
        fits = slopes.shape == (q.shape[1],) and q.shape[2] == k.shape[2]
        if not fits or slopes.requires_grad or (change.one_sided and seen.low < 0):
            return None
        operands["alibi_slopes"] = slopes
    return operands


def _call(
    score: Expression | None,
    mask: Expression | None,
    block_mask: Any,
    scale: float,
    q: Tensor,
    k: Tensor,
) -> Call:
    change = known.Score() if score is None else known.score_of(score)
    lengths = (q.shape[2], k.shape[2])
    softcap = None if change is None else change.softcap
    return Call(score, mask, block_mask, lengths, scale, change is not None, softcap)
