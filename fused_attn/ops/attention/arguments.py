"""What callers may write in more than one way, brought into the form of `Operands`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...runtime import checks, subclasses
from .problem import BLHD


def heads_first(layout: Any, *, q: Any, k: Any, v: Any, out: Any) -> tuple[Any, Any, Any, Any]:
    """Views (B, heads, L, head size) of tensors in another layout."""
    if layout != BLHD:
        raise ValueError(f"`layout` must be 'bhld' or 'blhd', got {layout!r}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.expect_rank(name, tensor, 4, "(B, L, heads, head size)")
    if out is not None:
        checks.expect_rank("out", out, 4, "(B, Lq, H, Dv)")
        out = out.transpose(1, 2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out


def understood(
    q: Any, k: Any, mask: Any, bias: Any, causal: Any
) -> tuple[Tensor | None, Tensor | None, Any]:
    """mask, bias and causal, with what a `CausalBias` of torch's says in its place."""
    said = {n: x for n, x in (("mask", mask), ("bias", bias)) if subclasses.is_causal_bias(x)}
    if not said:
        return mask, bias, causal
    checks.expect_rank("q", q, 4, "(B, H, Lq, D)")
    checks.expect_rank("k", k, 4, "(B, Hkv, Lk, D)")
    lengths = (q.shape[2], k.shape[2])
    mask, bias = None if "mask" in said else mask, None if "bias" in said else bias
    for name, given in said.items():
        shown, causal = subclasses.split_causal_bias(name, given, causal, lengths, q.device)
        if shown is not None:
            mask = shown if mask is None else mask & shown
    return mask, bias, causal


def four_dimensional(name: str, tensor: Tensor) -> Tensor:
    """A view with leading dimensions of 1; a rank above 4 stays for the checks to refuse."""
    checks.expect_tensor(name, tensor)
    missing = 4 - tensor.dim()
    return tensor[(None,) * missing] if missing > 0 else tensor


def documents(document_ids: Any, q: Any, k: Any) -> tuple[Any, Any]:
    """Ids of the queries and of the keys of a call of `attention`, of one dtype."""
    checks.expect_rank("q", q, 4, "(B, H, Lq, D)")
    checks.expect_rank("k", k, 4, "(B, Hkv, Lk, D)")
    return _pair(document_ids, q.shape[2], k.shape[2], "((B, Lq), (B, Lk))")


def documents_of_rows(document_ids: Any, q: Tensor, k: Tensor) -> tuple[Any, Any]:
    """The same of packed batches, as a batch of one."""
    pair = _pair(document_ids, q.shape[0], k.shape[0], "((Tq,), (Tk,))")
    for tensor, rows, layout in zip(pair, (q, k), ("(Tq,)", "(Tk,)"), strict=True):
        checks.expect_shape("document_ids", tensor, (rows.shape[0],), layout)
    return pair[0][None], pair[1][None]


def _pair(document_ids: Any, of_queries: int, of_keys: int, layouts: str) -> tuple[Any, Any]:
    """A pair, also where one tensor stands for both; `layouts`: its shapes, for messages."""
    if isinstance(document_ids, Tensor):
        if of_queries != of_keys:
            raise ValueError(
                f"`document_ids` must be a pair {layouts} where there are {of_queries} queries "
                f"and {of_keys} keys, got {checks.type_name(document_ids)}"
            )
        return document_ids, document_ids
    if not isinstance(document_ids, (tuple, list)) or len(document_ids) != 2:
        raise TypeError(
            f"`document_ids` must be a tensor or a pair {layouts}, "
            f"got {checks.type_name(document_ids)}"
        )
    ids, ids_k = document_ids
    for tensor in (ids, ids_k):
        checks.expect_tensor("document_ids", tensor)
    if ids.dtype != ids_k.dtype and {ids.dtype, ids_k.dtype} <= set(checks.ID_DTYPES):
        ids, ids_k = ids.long(), ids_k.long()
    return ids, ids_k
