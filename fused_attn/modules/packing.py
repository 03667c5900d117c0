"""Batches of sequences of unequal length, as the tokens that they really hold.

A padded batch or a NestedTensor becomes (T, E), the tokens of all sequences one after the other.
Whatever treats each token by itself (linear, activation, dropout, norm) runs on that unchanged;
attention takes the boundaries along.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import higher_order
from .residual import has_hooks

_TOKEN_WISE = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.RMSNorm, nn.Identity)


class Sequences(NamedTuple):
    """Where each sequence lies among the tokens."""

    cu_seqlens: Tensor  # (N + 1,) int32, cumulative lengths
    max_seqlen: int  # at least the longest length


class Padding(NamedTuple):
    """A padded batch: which of its rows are tokens."""

    rows: Tensor  # (T,) int64, row of each token in the flattened batch
    shape: torch.Size  # (N, L), (L, N) or (L,)

    def gather(self, x: Tensor) -> Tensor:
        """(N, L, E), (L, N, E) or (L, E) -> (T, E)."""
        return _Gather.apply(x.reshape(-1, x.shape[-1]), self.rows)

    def scatter(self, tokens: Tensor) -> Tensor:
        """(T, E) -> (N, L, E), (L, N, E) or (L, E), 0 where there is padding."""
        padded = _Scatter.apply(tokens, self.rows, self.shape.numel())
        return padded.view(*self.shape, tokens.shape[-1])


def find_padding(
    x: Tensor, key_padding_mask: Tensor | None, batch_first: bool
) -> tuple[Padding, Sequences] | None:
    """How to pack `x`, if it is a batch whose sequences are padded at their ends; else None.

    Reading the mask waits for the device, once. None where that cannot be: while somebody traces or
    captures, and inside torch.func's transforms.

    Args:
        x: (N, L, E), or (L, N, E) if not batch_first; unbatched (L, E).
        key_padding_mask: (N, L) or (L,) bool, True = padding.
    """
    if key_padding_mask is None or x.dim() not in (2, 3) or _is_traced(x):
        return None
    if x.dim() == 2 and key_padding_mask.dim() == 1:
        found = find_padding(x[None], key_padding_mask[None], batch_first=True)
        return found and (found[0]._replace(shape=x.shape[:1]), found[1])
    length, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, length):
        return None
    lengths = length - key_padding_mask.sum(dim=1)
    at_end = torch.arange(length, device=x.device) >= lengths[:, None]
    packable = torch.stack([key_padding_mask.any(), (at_end == key_padding_mask).all()])
    if not all(packable.tolist()):
        return None
    sequence, position = torch.nonzero(~key_padding_mask, as_tuple=True)
    rows = sequence * length + position if batch_first else position * batch + sequence
    return Padding(rows, x.shape[:2]), Sequences(_cumulative(lengths), length)


def is_token_wise(modules: Iterable[nn.Module]) -> bool:
    """True if calling each of `modules` on packed tokens is the same as on a padded batch."""
    return all(isinstance(m, _TOKEN_WISE) and not has_hooks(m) for m in modules)


def from_nested(x: Any) -> tuple[Tensor, Sequences]:
    """Tokens (T, E) of a NestedTensor of either layout, and their boundaries."""
    if x.layout == torch.jagged and x.lengths() is None:
        offsets = x.offsets()
        return x.values(), Sequences(offsets.to(torch.int32), x._get_max_seqlen())
    parts = x.unbind()
    lengths = [part.shape[0] for part in parts]
    tokens = torch.cat(parts)
    boundaries = _cumulative(torch.tensor(lengths, dtype=torch.int64)).to(tokens.device)
    return tokens, Sequences(boundaries, max(lengths, default=0))


def to_nested(tokens: Tensor, like: Any) -> Tensor:
    """NestedTensor of `tokens` (T, E) with the layout and lengths of `like`."""
    if like.layout == torch.jagged and like.lengths() is None:
        return torch.nested.nested_tensor_from_jagged(tokens, offsets=like.offsets())
    lengths = [part.shape[0] for part in like.unbind()]
    return torch.nested.as_nested_tensor(list(tokens.split(lengths)), layout=like.layout)


def pad_nested(x: Tensor) -> tuple[Tensor, Tensor]:
    """A NestedTensor as a padded batch (N, L, E) and its key padding mask (N, L)."""
    tokens, sequences = from_nested(x)
    padding = nested_padding(sequences)
    rows = torch.nonzero(~padding.flatten()).squeeze(1)
    return Padding(rows, padding.shape).scatter(tokens), padding


def unpad_nested(x: Tensor, padding: Tensor, like: Any) -> Tensor:
    """The reverse of `pad_nested`."""
    rows = torch.nonzero(~padding.flatten()).squeeze(1)
    return to_nested(Padding(rows, padding.shape).gather(x), like)


def nested_padding(sequences: Sequences) -> Tensor:
    """(N, L) bool, True = padding."""
    lengths = sequences.cu_seqlens.diff()
    position = torch.arange(sequences.max_seqlen, device=lengths.device)
    return position >= lengths[:, None]


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _is_traced(x: Tensor) -> bool:
    return (
        x.is_meta
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in (Tensor, nn.Parameter)
        or higher_order.needs_formula()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class _Gather(torch.autograd.Function):
    """Rows of a matrix, each taken at most once: the gradient is a copy, nothing is added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)
        ctx.total = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, *ctx.saved_tensors, ctx.total), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.index_select(0, *ctx.saved_tensors)


class _Scatter(torch.autograd.Function):
    """A matrix of zeros with these rows put in: the reverse of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)
        ctx.total = total
        return tokens.new_zeros((total, tokens.shape[1])).index_copy_(0, rows, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (rows,) = ctx.saved_tensors
        return tangent.new_zeros((ctx.total, tangent.shape[1])).index_copy_(0, rows, tangent)
