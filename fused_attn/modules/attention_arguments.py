"""What `torch.nn.MultiheadAttention.forward` accepts: the checks, and masks in the kernels' form.

Every fault raises the type that torch.nn raises for it (AssertionError for ranks and most shapes,
RuntimeError for dtypes and the size of `attn_mask`) with one text, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention.problem import Causal
from ..ops.dispatch import UnsupportedError
from ..runtime import autocast, checks, subclasses
from ..runtime.hints import with_hint
from . import mistakes


class Sizes(NamedTuple):
    """Sizes of one call: N batch, H heads, L queries, S keys; 3-D inputs or 2-D ones; layout."""

    batch: int
    heads: int
    queries: int
    keys: int
    batched: bool
    batch_first: bool = True


class Masks(NamedTuple):
    """Masks as `fused_attn.attention` takes them: True = visible."""

    bias: Tensor | None  # 4-D, broadcastable to (N, H, L, S)
    mask: Tensor | None  # bool, likewise
    key_padding_mask: Tensor | None  # (N, S) bool
    causal: Causal


def check_types(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise TypeError if an input is no tensor."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.expect_any_tensor(name, tensor)


def plain_mask(attn_mask: Any, device: torch.device) -> Tensor:
    """`attn_mask`; a `CausalBias` of torch's as the bool mask, True = masked out, that it means."""
    if subclasses.is_causal_bias(attn_mask):
        return ~attn_mask._materialize(device)
    return attn_mask


def check_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    embed_dim: int,
    key_dim: int,
    value_dim: int,
    same_embed_dim: bool,
    batch_first: bool,
) -> Sizes:
    """Check the three inputs against each other and the module.

    Raises:
        AssertionError: wrong rank, wrong embedding size, key and value do not fit each other.
        RuntimeError: another batch size or feature size.
        UnsupportedError: complex numbers.
    """
    rank = query.dim()
    if rank not in (2, 3):
        message = (
            f"query should be unbatched 2D or batched 3D tensor but received {rank}-D query tensor"
        )
        hint = "`fused_attn.attention` takes (B, H, L, D)" if rank == 4 else None
        raise AssertionError(with_hint(message, hint))
    batched = rank == 3
    if key.dim() != rank or value.dim() != rank:
        kind = "batched" if batched else "unbatched"
        raise AssertionError(
            f"For {kind} ({rank}-D) `query`, expected `key` and `value` to be {rank}-D "
            f"but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if query.shape[-1] != embed_dim:
        message = (
            f"was expecting embedding dimension of {embed_dim}, "
            f"but got {query.shape[-1]}: query has shape {tuple(query.shape)}"
        )
        raise AssertionError(with_hint(message, mistakes.hint_for_features(query, embed_dim)))
    if query.dtype.is_complex:
        raise UnsupportedError(f"`query` must be of a real floating dtype, got {query.dtype}")
    sequence = 1 if batched and batch_first else 0
    batch = query.shape[1 - sequence] if batched else 1
    sizes = Sizes(
        batch, num_heads, query.shape[sequence], key.shape[sequence], batched, batch_first
    )
    if same_embed_dim and query is key and key is value:
        return sizes
    if same_embed_dim and key.shape != value.shape:
        raise AssertionError(
            f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            f"key's sequence and batch dims {tuple(key.shape[:-1])} "
            f"do not match value's {tuple(value.shape[:-1])}"
        )
    if batched and key.shape[1 - sequence] != batch:
        message = (
            f"`key` and `value` must have the batch size of `query`, {batch}, "
            f"got {key.shape[1 - sequence]}"
        )
        fits = key.shape[sequence] == query.shape[sequence]
        raise RuntimeError(with_hint(message, mistakes.other_order(batch_first) if fits else None))
    fault = RuntimeError if same_embed_dim else AssertionError
    for name, tensor, size in (("key", key, key_dim), ("value", value, value_dim)):
        if tensor.shape[-1] != size:
            message = (
                f"`{name}` must have {size} features in its last dimension, "
                f"got shape {tuple(tensor.shape)}"
            )
            argument = "kdim" if name == "key" else "vdim"
            hint = f"the constructor takes `{argument}={tensor.shape[-1]}`"
            raise fault(with_hint(message, hint))
    return sizes


def mask_dtypes(query: Tensor) -> tuple[torch.dtype, ...]:
    """The floating dtypes that a mask may have: the query's, float32 and that of autocast."""
    if autocast.enabled(query.device):
        return query.dtype, torch.float32, torch.get_autocast_dtype(query.device.type)
    return query.dtype, torch.float32


def check_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    sizes: Sizes,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Check the masks against the sizes of the call.

    Args:
        dtypes: the floating dtypes that a mask may have.

    Raises:
        TypeError: a mask is no tensor.
        AssertionError: neither bool nor floating; wrong rank; wrong size of `key_padding_mask`.
        RuntimeError: wrong size of `attn_mask`; a floating dtype that is not among `dtypes`.
    """
    if key_padding_mask is not None:
        _check_mask_dtype("key_padding_mask", key_padding_mask, dtypes)
        _check_padding_shape(key_padding_mask, sizes)
    if attn_mask is not None:
        _check_mask_dtype("attn_mask", attn_mask, dtypes)
        _check_attention_shape(attn_mask, sizes)


def _check_mask_dtype(name: str, mask: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    checks.expect_any_tensor(name, mask)
    if mask.dtype == torch.bool or mask.dtype in dtypes:
        return
    if not mask.is_floating_point():
        message = f"only bool and floating types of {name} are supported, got {mask.dtype}"
        raise AssertionError(with_hint(message, mistakes.hint_for_mask_dtype(name, mask, dtypes)))
    accepted = " or ".join(str(dtype) for dtype in dict.fromkeys((torch.bool, *dtypes)))
    message = f"Expected {name} dtype to be {accepted}, but got {mask.dtype}"
    raise RuntimeError(with_hint(message, mistakes.hint_for_mask_dtype(name, mask, dtypes)))


def _check_padding_shape(mask: Tensor, sizes: Sizes) -> None:
    rank = 2 if sizes.batched else 1
    if mask.dim() != rank:
        kind = "batched (3-D)" if sizes.batched else "unbatched (2-D)"
        message = (
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {rank}-D "
            f"but found {mask.dim()}-D tensor instead"
        )
        raise AssertionError(with_hint(message, mistakes.hint_for_padding(mask, sizes)))
    expected = (sizes.batch, sizes.keys) if sizes.batched else (sizes.keys,)
    if tuple(mask.shape) != expected:
        message = f"Expected `key_padding_mask` shape to be {expected} but got {tuple(mask.shape)}"
        raise AssertionError(with_hint(message, mistakes.hint_for_padding(mask, sizes)))


def _check_attention_shape(mask: Tensor, sizes: Sizes) -> None:
    rank, shape = mask.dim(), tuple(mask.shape)
    scores = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    if rank == 4:
        if any(size not in (1, full) for size, full in zip(shape, scores, strict=True)):
            raise AssertionError(
                f"Expected 4-D `attn_mask` to be broadcastable to {scores} but got {shape}"
            )
        return
    if rank not in (2, 3):
        kind = "batched (3-D)" if sizes.batched else "unbatched (2-D)"
        message = (
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D "
            f"but found {rank}-D tensor instead (4-D, broadcastable to {scores}, is accepted too)"
        )
        raise AssertionError(with_hint(message, mistakes.hint_for_attention(mask, sizes)))
    expected: tuple[int, ...] = scores[2:]
    if rank == 3:
        expected = (sizes.batch * sizes.heads, *expected)
    if shape == expected:
        return
    if rank == 3 and not sizes.batched:
        raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {shape}")
    message = f"The shape of the {rank}D attn_mask is {shape}, but should be {expected}."
    raise RuntimeError(with_hint(message, mistakes.hint_for_attention(mask, sizes)))


def make_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    sizes: Sizes,
    appended: int,
    like: Tensor,
    past: int | None = None,
) -> Masks:
    """Checked masks of torch.nn (True = masked out) in the form of `fused_attn.attention`.

    `is_causal` masks whatever lies above the diagonal, with or without `attn_mask`. Where queries
    and keys differ in number, "causal" could mean either alignment: then a given `attn_mask` alone
    decides, and without one the first query meets the first key, as in torch.

    Args:
        appended: how many always visible keys (bias_kv, zero attention) follow the S keys.
        like: the projected query, for its device and dtype.
        past: keys that a cache held before the call; None: no cache. With one there is no doubt
            about the diagonal: the last query meets the last key, with an `attn_mask` too.
    """
    precision = torch.promote_types(like.dtype, torch.float32)
    bias = mask = keep = None
    if attn_mask is not None:
        attn_mask = _four_dimensional(attn_mask, sizes)
        if attn_mask.dtype == torch.bool:
            mask = ~attn_mask
        else:
            bias = attn_mask
    if key_padding_mask is not None:
        if not sizes.batched:
            key_padding_mask = key_padding_mask[None]
        if key_padding_mask.dtype == torch.bool:
            keep = ~key_padding_mask
        else:
            padding = key_padding_mask[:, None, None, :]
            # Added in the precision of the scores, whatever that of the masks.
            bias = padding if bias is None else bias.to(precision) + padding.to(precision)
    causal: Causal = is_causal and (attn_mask is None or sizes.queries == sizes.keys)
    if causal and past is None and sizes.queries < sizes.keys:
        mistakes.warn_of_upper_left(sizes.queries, sizes.keys)
    shift = 0
    if is_causal and past is not None:
        causal, shift = "lower_right", sizes.keys - sizes.queries
    if appended == 0:
        return Masks(bias, mask, keep, causal)
    if causal:
        # The diagonal stops short of the appended keys, which every query sees.
        scores = (1, 1, sizes.queries, sizes.keys)
        triangle = torch.ones(scores, dtype=torch.bool, device=like.device).tril(shift)
        mask = triangle if mask is None else mask & triangle
    return Masks(
        _append_keys(bias, sizes.keys, appended, 0.0),
        _append_keys(mask, sizes.keys, appended, True),
        _append_keys(keep, sizes.keys, appended, True),
        False,
    )


def _four_dimensional(mask: Tensor, sizes: Sizes) -> Tensor:
    if mask.dim() == 2:
        return mask[None, None]
    if mask.dim() == 3:
        return mask.unflatten(0, (sizes.batch, sizes.heads))
    return mask


def _append_keys(mask: Tensor | None, keys: int, appended: int, value: float) -> Tensor | None:
    if mask is None:
        return None
    return F.pad(mask.expand(*mask.shape[:-1], keys), (0, appended), value=value)
