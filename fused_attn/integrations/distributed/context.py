"""Context parallelism: within this, every attention call is over the sequence of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.attention.problem import BHLD
from ...ops.dispatch import UnsupportedError
from ...runtime import sequence
from . import ring, ulysses
from .call import Call, prepared
from .layouts import Group, Order, expect_order, group_of, positions

Method = Literal["ring", "ulysses"]


@dataclass(frozen=True)
class Spread:
    """A sequence whose parts are on the ranks of `group`; what `runtime.sequence` asks."""

    group: dist.ProcessGroup
    order: Order
    method: Method
    check: bool

    @torch.compiler.disable  # collectives and checks are no graph; what is around them may be one
    def attend(self, operands: Any, scalars: Any) -> tuple[Tensor, Tensor | None, None]:
        """One call of attention: on this rank's queries, over the keys of all ranks."""
        if operands.cu_seqlens_q is not None:
            raise UnsupportedError(
                "a packed batch inside `context_parallel` does not say whether its lengths are of "
                "all ranks\nhint: `ring_attention(..., cu_seqlens=...)` with those of all ranks; "
                "`pack_padding = False` of encoder and decoder layers"
            )
        documents = operands.query_documents, operands.key_documents
        arguments = {
            "function": "attention inside `context_parallel`",
            **{name: getattr(scalars, name) for name in ("causal", "window", "softcap", "scale")},
            **{name: getattr(scalars, name) for name in ("dropout_p", "return_lse", "backend")},
            **{n: getattr(operands, n) for n in ("key_padding_mask", "sinks", "dropout_rng")},
            "cu_seqlens": None,
            "document_ids": documents if documents[0] is not None else None,
            "layout": BHLD,
            "order": self.order,
        }
        uncut = ("mask", "bias", "alibi_slopes", "key_lengths", "prefix_lengths")
        unknown = {name: getattr(operands, name) for name in uncut}
        unknown |= {name: getattr(scalars, name) for name in ("chunk", "return_weights")}
        divides = ulysses.expect_heads if self.method == "ulysses" else None
        call = prepared(
            arguments,
            operands.q,
            operands.k,
            operands.v,
            self.group,
            check=self.check,
            unknown=unknown,
            divides=divides,
        )
        out, lse = self._run(call)
        return out, lse if scalars.return_lse else None, None

    def _run(self, call: Call) -> tuple[Tensor, Tensor]:
        return ulysses.run(call) if self.method == "ulysses" else ring.run(call)

    def positions(self, length: int, device: torch.device) -> Tensor:
        return positions(length, self.group.rank(), self.group.size(), self.order, device)

    def is_part(self, rows: int, length: int) -> bool:
        """Tables are whole: the caller cuts up nothing but what goes into the model."""
        return False


@contextlib.contextmanager
def context_parallel(
    group: Group = None,
    *,
    order: Order = "contiguous",
    method: Method = "ring",
    check: bool = True,
) -> Iterator[None]:
    """Within this, tensors hold this rank's part of the sequence, and attention sees all of it.

        with context_parallel(mesh["cp"], order="zigzag"):
            loss = model(shard(tokens, mesh["cp"], order="zigzag"))

    That is so for every attention of the package: functions, modules, swapped models. Rotary and
    counted positions go by the whole sequence. What has a number for each pair of positions, or
    would take a part for the whole (masks, caches, packed batches, `flex_attention`), is refused.
    The backward may run inside or outside.

    Args:
        group: process group, or mesh of one dimension; the default group if None.
        order: how the sequence is spread, "contiguous" or "zigzag" (`shard`).
        method: "ring" or "ulysses".
        check: as in `ring_attention`, of each call.

    Raises:
        ValueError: an argument is wrong.
    """
    members = group_of(group)
    expect_order(order)
    if method not in ("ring", "ulysses"):
        raise ValueError(f"`method` must be 'ring' or 'ulysses', got {method!r}")
    with sequence.entered(Spread(members, order, method, check)):
        yield
