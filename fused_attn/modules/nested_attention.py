"""Multi-head attention of NestedTensors: packed where that says it all, padded otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol

from torch import Tensor, nn

from . import packing, token_wise
from .linear import call_linear


class Attention(Protocol):
    """What is asked here of a `FusedMultiheadAttention`, which calls this file."""

    embed_dim: int
    kdim: int
    vdim: int
    batch_first: bool
    add_zero_attn: bool

    @property
    def bias_k(self) -> Tensor | None: ...

    @property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor | None]]: ...

    @property
    def attend_packed_heads(self) -> Callable[..., Tensor]: ...

    @property
    def out_proj(self) -> nn.Module: ...


def forward(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """`FusedMultiheadAttention.forward` of NestedTensors (N, *, E), of either layout.

    Returns:
        The output, nested as `query`; and the weights, padded with zeros, (N, L, S') or
        (N, H, L, S') with the longest L and S, or None.

    Raises:
        AssertionError: one input is nested and another is not, a mask is given, the module is not
            batch_first, or sizes do not fit.
    """
    _check(module, (query, key, value), key_padding_mask, attn_mask)
    if not (need_weights or module.add_zero_attn or module.bias_k is not None):
        return _packed(module, query, key, value, is_causal), None
    padded_query, query_padding = packing.pad_nested(query)
    same = key is query
    padded_key, padding = (padded_query, query_padding) if same else packing.pad_nested(key)
    padded_value = padded_key if value is key else packing.pad_nested(value)[0]
    out, weights = module.forward(
        padded_query,
        padded_key,
        padded_value,
        key_padding_mask=padding,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    if weights is not None:
        hidden = query_padding[:, :, None]
        weights = weights.masked_fill(hidden if average_attn_weights else hidden[:, None], 0.0)
    return packing.unpad_nested(out, query_padding, query), weights


def _packed(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> Tensor:
    tokens, sequences = packing.from_nested(query)
    if key is query:
        key_tokens, key_sequences = tokens, sequences
    else:
        key_tokens, key_sequences = packing.from_nested(key)
    value_tokens = key_tokens if value is key else packing.from_nested(value)[0]
    if value_tokens.shape[0] != key_tokens.shape[0]:
        _refuse(f"got {key_tokens.shape[0]} keys but {value_tokens.shape[0]} values")
    out = module.attend_packed_heads(
        tokens, key_tokens, value_tokens, sequences, key_sequences, is_causal
    )
    if token_wise.is_token_wise(module.out_proj):
        return packing.to_nested(call_linear(module.out_proj, out), query)
    return module.out_proj(packing.to_nested(out, query))  # it may ask which sequence is which


def _check(
    module: Attention,
    inputs: tuple[Tensor, ...],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    query = inputs[0]
    if query.dim() != 3:
        raise AssertionError(
            "query should be unbatched 2D or batched 3D tensor "
            f"but received {query.dim()}-D query tensor"
        )
    if not all(x.is_nested and x.dim() == 3 for x in inputs):
        _refuse(
            "all of `query`, `key` and `value` must be nested and 3-D, or none\n"
            "hint: `torch.nested.as_nested_tensor([...], layout=torch.jagged)`"
        )
    if key_padding_mask is not None or attn_mask is not None:
        _refuse(
            "with masks: the lengths of the sequences say what is padding\n"
            "hint: leave the masks out; `is_causal=True` is taken beside them"
        )
    if not module.batch_first:
        _refuse("unless the module is batch_first\nhint: `batch_first=True` in the constructor")
    sizes = (module.embed_dim, module.kdim, module.vdim)
    if any(x.size(-1) != size for x, size in zip(inputs, sizes, strict=True)):
        _refuse(f"of feature sizes other than {sizes}, got {[x.size(-1) for x in inputs]}")
    if any(x.size(0) != query.size(0) for x in inputs):
        _refuse(f"of different batch sizes, got {[x.size(0) for x in inputs]}")


def _refuse(why: str) -> NoReturn:
    raise AssertionError(f"MultiheadAttention does not support NestedTensor inputs {why}")
