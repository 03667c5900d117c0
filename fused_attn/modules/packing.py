"""Batches of sequences of unequal length, as the tokens that they really hold.

A padded batch or a NestedTensor becomes (T, E), the tokens of all sequences one after the other.
Whatever treats each token by itself (linear, activation, dropout, norm) runs on that unchanged;
attention takes the boundaries along.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Where each sequence lies among the tokens."""

    cu_seqlens: Tensor  # (N + 1,) int32, cumulative lengths
    max_seqlen: int  # at least the longest length

    def positions(self, total: int) -> Tensor:
        """(total,) int64, the position of each of the `total` tokens in its sequence."""
        token = torch.arange(total, device=self.cu_seqlens.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), token, right=True)
        return token - self.cu_seqlens[sequence]


class Padding(NamedTuple):
    """A padded batch: which of its rows are tokens."""

    rows: Tensor | None  # (T,) int64, row of each token in the flattened batch; None: all, in turn
    shape: torch.Size  # (N, L), (L, N) or (L,)
    batch_first: bool = True  # False for (L, N)

    def gather(self, x: Tensor) -> Tensor:
        """(N, L, E), (L, N, E) or (L, E) -> (T, E), one sequence after the other."""
        width = x.shape[-1]
        if self.rows is None:
            return (x if self.batch_first else x.transpose(0, 1)).reshape(-1, width)
        rows = self.rows
        if x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
            # A transposed view of a batch: take its rows where they lie, instead of copying twice.
            first, second = self.shape
            rows = rows % second * first + rows // second
            x = x.transpose(0, 1)
        return _Gather.apply(x.reshape(-1, width), rows)

    def scatter(self, tokens: Tensor) -> Tensor:
        """(T, E) -> (N, L, E), (L, N, E) or (L, E), 0 where there is padding."""
        width = tokens.shape[-1]
        if self.rows is not None:
            padded = _Scatter.apply(tokens, self.rows, self.shape.numel())
            return padded.view(*self.shape, width)
        if self.batch_first:
            return tokens.view(*self.shape, width)
        length, batch = self.shape
        return tokens.view(batch, length, width).transpose(0, 1).contiguous()


def from_nested(x: Any) -> tuple[Tensor, Sequences]:
    """Tokens (T, E) of a NestedTensor of either layout, and their boundaries."""
    if x.layout == torch.jagged and x.lengths() is None:
        offsets = x.offsets()
        return x.values(), Sequences(offsets.to(torch.int32), x._get_max_seqlen())
    parts = x.unbind()
    lengths = [part.shape[0] for part in parts]
    tokens = torch.cat(parts)
    boundaries = cumulative(torch.tensor(lengths, dtype=torch.int64)).to(tokens.device)
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


def cumulative(lengths: Tensor) -> Tensor:
    """(N,) lengths -> (N + 1,) int32, where each sequence starts, and the end."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _put_rows(tokens: Tensor, rows: Tensor, total: int) -> Tensor:
    return tokens.new_zeros((total, tokens.shape[1])).index_copy_(0, rows, tokens)


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
        (rows,) = ctx.saved_tensors
        return _put_rows(grad, rows, ctx.total), None

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
        return _put_rows(tokens, rows, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (rows,) = ctx.saved_tensors
        return _put_rows(tangent, rows, ctx.total)
