"""One call of attention over parts of a sequence: checked, agreed on, and brought into one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from ...ops.attention import call as attention_call
from ...ops.attention.api import attention
from ...ops.attention.arguments import documents, heads_first
from ...ops.attention.call import Scalars
from ...ops.attention.problem import BHLD, BLHD, CAUSAL, UPPER_LEFT, Operands
from ...ops.dispatch import UnsupportedError
from ...runtime import autocast, checks, hints, philox
from .communication import agree, first_ranks
from .layouts import Group, Order, expect_order, group_of, pieces, positions
from .tiles import Band, Dropout

# Arguments that have one number for each pair of positions, or none that parts would have.
_UNCUT = {
    "mask": "`document_ids`, `key_padding_mask`, `causal` and `window` can be cut up",
    "bias": "`window` or `softcap`; a bias has a number for each pair of positions",
    "alibi_slopes": "rotary positions, or `window`",
    "key_lengths": "`key_padding_mask` of this rank's part",
    "prefix_lengths": "`fused_attn.attention` on one process",
    "chunk": "`document_ids` = position // chunk, of this rank's part",
    "return_weights": "`return_lse`; weights have a number for each pair of positions",
    "out": "the tensor that comes back",
}


@dataclass(frozen=True)
class Heads:
    """Which heads of the whole these are: `first` and those after it, out of `total`."""

    first: int
    total: int


@dataclass(frozen=True)
class Call:
    """A checked call, heads first: q, k, v (B, heads, L / n, head size)."""

    q: Tensor
    k: Tensor
    v: Tensor
    group: dist.ProcessGroup
    causal: Any
    window: tuple[int, int] | None
    cu_seqlens: Tensor | None
    document_ids: tuple[Tensor, Tensor] | None
    key_padding_mask: Tensor | None
    sinks: Tensor | None
    softcap: float | None
    scale: float | None
    dropout_p: float
    dropout_rng: Tensor | None  # the same on all ranks
    layout: str
    order: Order
    return_lse: bool
    backend: str | None
    heads: Heads

    def band(self) -> Band:
        """Causal and window, as one band of positions of the whole sequence."""
        left, right = self.window or (-1, -1)
        upper_left = CAUSAL[self.causal] == UPPER_LEFT or self.cu_seqlens is not None
        longer = self.k.shape[2] - self.q.shape[2]
        if self.causal:
            right = 0
        return Band(left, right, 0 if upper_left else longer * self.group.size())

    def documents(self) -> tuple[Tensor | None, Tensor | None]:
        """Ids of this rank's queries and keys; a packed batch's sequences are documents."""
        if self.document_ids is not None:
            queries, keys = self.document_ids
            return queries.long(), keys.long()
        if self.cu_seqlens is None:
            return None, None
        group = self.group
        at = positions(self.q.shape[2], group.rank(), group.size(), self.order, self.q.device)
        ends = self.cu_seqlens[1:].long()
        ids = torch.searchsorted(ends, at, right=True)
        # Rows past the last sequence belong to nobody, and do not see each other either.
        nobodys = ids == len(ends)
        return ids.masked_fill(nobodys, -2)[None], ids.masked_fill(nobodys, -1)[None]

    def dropout(self) -> Dropout | None:
        if self.dropout_rng is None:
            return None
        return Dropout(self.dropout_p, self.dropout_rng, self.heads.total, self.heads.first)

    def finish(self, out: Tensor, lse: Tensor) -> Any:
        """In the caller's layout."""
        if self.cu_seqlens is not None:
            out, lse = out[0].transpose(0, 1), lse[0]
        elif self.layout == BLHD:
            out = out.transpose(1, 2)
        return (out, lse) if self.return_lse else out


def described(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a public function, without those that `prepared` takes by themselves."""
    rest = ("q", "k", "v", "group", "check", "unknown", "ring")
    return {n: x for n, x in arguments.items() if n not in rest} | {"function": function}


def prepared(
    arguments: dict[str, Any],
    q: Any,
    k: Any,
    v: Any,
    group: Group,
    *,
    check: bool,
    unknown: dict[str, Any],
    divides: Any = None,
    across: Group = None,
) -> Call:
    """A call on which all ranks agree.

    Args:
        arguments: of `described`.
        unknown: arguments that the function does not have.
        divides: (q, k, ranks) raises where heads do not divide.
        across: another group that must agree too.

    Raises:
        TypeError, ValueError, UnsupportedError: here, or on another rank.
    """
    members = group_of(group)
    found: list[Call] = []

    def describe() -> str:
        _refuse(arguments["function"], unknown)
        call = _made(dict(arguments), q, k, v, members)
        if divides is not None:
            divides(call.q, call.k, members.size())
        found.append(call)
        return _said(call)

    if check:
        agree(describe, members, *([] if across is None else [group_of(across)]))
    else:
        describe()
    call = found[-1]
    if not call.dropout_p:
        return call
    rng = philox.draw_rng(call.q.device) if call.dropout_rng is None else call.dropout_rng
    rng = first_ranks(rng, members)
    if across is not None:
        rng = first_ranks(rng, group_of(across))
    return dataclasses.replace(call, dropout_rng=rng)


def _refuse(function: str, unknown: dict[str, Any]) -> None:
    for name, value in unknown.items():
        if name in _UNCUT and value is None:
            continue
        if name in _UNCUT:
            raise UnsupportedError(
                f"`{name}` cannot be cut up for {function}\nhint: {_UNCUT[name]}"
            )
        known = set(attention.__annotations__) - set(_UNCUT) | {"cu_seqlens", "order", "group"}
        hints.refuse_unknown(function, {name: value}, known)


def _made(given: dict[str, Any], q: Any, k: Any, v: Any, group: dist.ProcessGroup) -> Call:
    """The call of this rank, if it is right."""
    expect_order(given["order"])
    packed = given["cu_seqlens"] is not None
    if packed:
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.expect_rank(name, x, 3, "(T / n, heads, head size), as there is `cu_seqlens`")
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        _check_packed(given, q, k, group.size())
    elif given["layout"] != BHLD:
        q, k, v, _ = heads_first(given["layout"], q=q, k=k, v=v, out=None)
    q, k, v = (x.clone() if isinstance(x, AsyncCollectiveTensor) else x for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.expect_rank(name, x, 4, "(B, heads, L / n, head size)")
        if type(x) not in (Tensor, torch.nn.Parameter):
            raise TypeError(
                f"`{name}` must be a plain tensor, this rank's part, got {type(x).__name__}\n"
                f"hint: `{name}.to_local()` of a DTensor that is cut up along the sequence"
            )
    dtype = autocast.dtype_for(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    ids = given["document_ids"]
    ids = None if ids is None else documents(ids, q, k)
    queries, keys = ids or (None, None)
    operands = Operands(
        q,
        k,
        v,
        key_padding_mask=given["key_padding_mask"],
        dropout_rng=given["dropout_rng"] if given["dropout_p"] else None,
        sinks=given["sinks"],
        query_documents=queries,
        key_documents=keys,
    )
    names = ("causal", "window", "softcap", "scale", "dropout_p", "backend")
    attention_call.problem_of(operands, Scalars(**{name: given[name] for name in names}))
    for rows in (q.shape[2], k.shape[2]):
        pieces(rows, group.rank(), group.size(), given["order"])
    given |= {"q": q, "k": k, "v": v, "document_ids": ids, "heads": Heads(0, q.shape[1])}
    given |= {"dropout_rng": operands.dropout_rng, "group": group}
    del given["function"]
    return Call(**given)


def _check_packed(given: dict[str, Any], q: Tensor, k: Tensor, size: int) -> None:
    starts = given["cu_seqlens"]
    checks.expect_rank("cu_seqlens", starts, 1, "(sequences + 1,)")
    checks.expect_dtype("cu_seqlens", starts, (torch.int32,))
    checks.expect_device("cu_seqlens", starts, q.device)
    for name in ("document_ids", "key_padding_mask"):
        if given[name] is not None:
            raise ValueError(f"`{name}` must be None beside `cu_seqlens`, which says what it would")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            "`k` must have as many rows as `q` beside `cu_seqlens`, which is of both, "
            f"got {k.shape[2]} and {q.shape[2]}"
        )
    if starts.device.type == "cpu":
        numbers = starts.tolist()
        if not numbers or numbers[0] != 0 or sorted(numbers) != numbers:
            raise ValueError(f"`cu_seqlens` must start at 0 and not fall, got {numbers}")
        if numbers[-1] > q.shape[2] * size:
            raise ValueError(
                f"`cu_seqlens` must end within the {q.shape[2] * size} rows of all {size} ranks, "
                f"got {numbers[-1]}"
            )


def _said(call: Call) -> str:
    """What must be equal on all ranks."""
    parts = [
        f"`{name}` {x.dtype} {tuple(x.shape)} on {x.device.type}"
        for name, x in (("q", call.q), ("k", call.k), ("v", call.v))
    ]
    grads = [n for n in ("q", "k", "v", "sinks") if getattr(getattr(call, n), "requires_grad", 0)]
    wanted = bool(grads) and torch.is_grad_enabled()
    parts += [f"`{n}` {getattr(call, n)}" for n in ("causal", "window", "softcap", "scale")]
    parts += [f"`{n}` {getattr(call, n)}" for n in ("dropout_p", "order", "layout")]
    for name in ("cu_seqlens", "document_ids", "key_padding_mask", "sinks"):
        there = getattr(call, name) is not None
        parts.append(f"{'a' if there else 'no'} `{name}`")
    parts.append("gradients" if wanted else "no gradients")
    return "; ".join(parts)
