"""torch's `scaled_dot_product_attention`, run by the fused backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# By this name: somebody may have put ours in the place of torch's.
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from ...runtime import checks, subclasses
from ..dispatch import UnsupportedError
from .api import attention
from .problem import Causal


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, fused on every path.

    Takes everything that torch's function takes and gives what it gives. Where torch's paths
    disagree with each other there is one rule here: `attn_mask` and `is_causal` given together both
    apply, at every rank; masks of rank 0 and 1 broadcast; a row without a visible key gives 0; a
    `scale` that is not positive is right under `is_causal`. The output is always contiguous.

    Args:
        query: (..., Hq, L, E), two dimensions or more; two mean one head. A NestedTensor is
            handed to torch's own function.
        key: (..., H, S, E). value: (..., H, S, Ev). Leading dimensions broadcast.
        attn_mask: broadcastable to (..., Hq, L, S): bool, True = visible, or float, added to the
            scores (query's dtype or float32); or a `CausalBias` of `torch.nn.attention.bias`.
        dropout_p: applied whenever it is not 0, as in torch.
        is_causal: query i sees key j iff j <= i (upper left).
        scale: 1/sqrt(E) if None; a number of NumPy's or a tensor of one number will do.
        enable_gqa: allow Hq to be a multiple of H; without it the heads must be equal or 1.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        (..., Hq, L, Ev) in query's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.

    Shape legend: L and S lengths, E and Ev head sizes, Hq and H heads, ... batch dimensions.
    """
    given = (("query", query), ("key", key), ("value", value))
    if any(isinstance(x, Tensor) and (x.is_nested or _has_nothing(x)) for _, x in given):
        if backend is not None and query.is_nested:
            raise UnsupportedError(f"backend {backend!r} takes no NestedTensors")
        return torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    for name, tensor in given:
        checks.expect_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"`{name}` must have at least 2 dimensions (L, E), got {tuple(tensor.shape)}"
            )
    if scale is not None and type(scale) not in (float, int):
        scale = _number(scale)
    causal: Causal = bool(is_causal)
    if attn_mask is not None and subclasses.is_causal_bias(attn_mask):
        if is_causal:
            raise ValueError("`is_causal` must be False where `attn_mask` is a CausalBias")
        attn_mask, causal = subclasses.split_causal_bias(
            "attn_mask", attn_mask, False, (query.shape[-2], key.shape[-2]), query.device
        )
    if attn_mask is not None:
        checks.expect_tensor("attn_mask", attn_mask)
        checks.expect_dtype("attn_mask", attn_mask, (torch.bool, *checks.FLOAT_DTYPES))
    if query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return _attend(query, key, value, attn_mask, dropout_p, causal, scale, backend)
    shape = _leading_shape(query, key, value, enable_gqa)
    rank = max(query.dim(), key.dim(), value.dim())
    batch = shape[:-1]
    q = _batched(query, batch, shape[-1])
    k, v = _key_value(key, value, batch, shape[-1], enable_gqa)
    mask = None
    if attn_mask is not None:
        scores = (*shape[len(shape) + 2 - rank :], query.shape[-2], key.shape[-2])
        checks.expect_broadcastable("attn_mask", attn_mask, scores, "(..., Hq, L, S)")
        mask = _batched_mask(attn_mask, batch)
    out = _attend(q, k, v, mask, dropout_p, causal, scale, backend)
    return out if rank == 4 else out.reshape(*shape[len(shape) + 2 - rank :], *out.shape[-2:])


def _has_nothing(tensor: Tensor) -> bool:
    """True where torch must say what comes out: no batch element, no head, or no head size."""
    shape = tensor.shape
    return len(shape) >= 2 and (shape[-1] == 0 or 0 in shape[:-2])


def _number(scale: Any) -> Any:
    """A scale of another kind as a float; what is none stays for the checks to refuse."""
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError):
        return scale


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: Causal,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """Attention in four dimensions; a bool mask hides, a float one is added."""
    is_bool = mask is not None and mask.dtype == torch.bool
    try:
        return attention(
            q,
            k,
            v,
            causal=causal,
            mask=mask if is_bool else None,
            bias=None if is_bool else mask,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )
    except ValueError as error:
        raise ValueError(_in_torchs_names(error)) from None
    except TypeError as error:
        raise TypeError(_in_torchs_names(error)) from None


# Names of `attention`'s arguments and what they are called here.
_TORCHS_NAMES = (
    ("`q`", "`query`"),
    ("`k`", "`key`"),
    ("`v`", "`value`"),
    ("`mask`", "`attn_mask`"),
    ("`bias`", "`attn_mask`"),
    ("`causal`", "`is_causal`"),
)


def _in_torchs_names(error: Exception) -> str:
    message = str(error.args[0])
    for ours, torchs in _TORCHS_NAMES:
        message = message.replace(ours, torchs)
    return message


def _leading_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """(*batch, Hq) that the inputs broadcast to, batch having at least one dimension."""
    leading = {"query": query.shape[:-2], "key": key.shape[:-2], "value": value.shape[:-2]}
    if enable_gqa:  # key and value heads repeat instead of broadcasting
        for name in ("key", "value"):
            leading[name] = torch.Size((*leading[name][:-1], 1)) if leading[name] else leading[name]
    try:
        shape = tuple(torch.broadcast_shapes(*leading.values()))
    except RuntimeError:
        found = ", ".join(f"`{name}` {tuple(sizes)}" for name, sizes in leading.items())
        hint = "" if enable_gqa else "; grouped heads need enable_gqa=True"
        raise ValueError(
            f"leading dimensions (..., H) must broadcast against each other, got {found}{hint}"
        ) from None
    return (1,) * (2 - len(shape)) + shape


def _batched(tensor: Tensor, batch: tuple[int, ...], num_heads: int) -> Tensor:
    """(..., H, L, E) -> (B, num_heads, L, E); a view where there is at most one batch dimension."""
    return tensor.expand(*batch, num_heads, *tensor.shape[-2:]).flatten(0, -4)


def _key_value(
    key: Tensor, value: Tensor, batch: tuple[int, ...], num_heads: int, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    heads_k, heads_v = (t.shape[-3] if t.dim() > 2 else 1 for t in (key, value))
    for name, heads in (("key", heads_k), ("value", heads_v)):
        if heads == 0 or num_heads % heads != 0:
            raise ValueError(
                f"`{name}` must have a number of heads that divides that of `query`, "
                f"got {heads} and {num_heads}"
            )
    k, v = _batched(key, batch, heads_k), _batched(value, batch, heads_v)
    if heads_k != heads_v:
        # Attention groups the heads of both alike; give both the larger of the two numbers.
        shared = max(heads_k, heads_v)
        if shared % min(heads_k, heads_v) != 0:
            shared = num_heads
        k = k.repeat_interleave(shared // heads_k, dim=1)
        v = v.repeat_interleave(shared // heads_v, dim=1)
    return k, v


def _batched_mask(attn_mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Up to four dimensions, broadcastable to (B, Hq, L, S), expanded only if it must be."""
    if attn_mask.dim() <= 4 and len(batch) == 1:
        return attn_mask
    attn_mask = attn_mask[(None,) * (len(batch) + 3 - attn_mask.dim())]
    if all(size == 1 for size in attn_mask.shape[:-3]):
        return attn_mask.flatten(0, -4)
    return attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
