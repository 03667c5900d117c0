"""Which padded batches can run packed: padding found by reading the masks.

Reading waits for the device, once. Nothing is read, and nothing packed, where that cannot be: while
somebody traces or captures, and inside torch.func's transforms. Who asks is told why not, in words
that cost nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..runtime import higher_order
from . import packing, token_wise
from .attention import FusedMultiheadAttention
from .packing import Padding, Sequences
from .residual import has_hooks

NO_PADDING = "no position is padding"
_FLOATING_MASK = "the padding mask is not bool"
_UNFIT_MASK = "the padding mask does not fit"
_UNFIT_INPUT = "the sizes of the inputs do not fit"
_NOT_AT_END = "padding lies elsewhere than at the ends"
_MEMORY_MASK = "there is a `memory_mask`"
_OTHER_MASK = "the attention mask is neither causal nor none"


class Masks(NamedTuple):
    """Those of a decoder, as torch.nn names them."""

    tgt: Tensor | None
    memory: Tensor | None
    tgt_padding: Tensor | None
    memory_padding: Tensor | None


class PackedSelf(NamedTuple):
    """A batch that attends to itself."""

    padding: Padding
    sequences: Sequences
    causal: bool  # no position sees a later one


class PackedCross(NamedTuple):
    """A batch that attends to itself and then to `memory`."""

    tgt: PackedSelf
    memory: Padding
    memory_sequences: Sequences


def find(
    x: Tensor,
    key_padding_mask: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    attention: nn.MultiheadAttention,
) -> PackedSelf | str:
    """How to pack `x`, if its sequences are padded at their ends; else why not.

    Args:
        x: (N, L, E), or (L, N, E) if `attention` is not batch_first; unbatched (L, E).
        key_padding_mask: (N, L) or (L,) bool, True = padding.
        mask, is_causal: as `attn_mask` and `is_causal` of `FusedMultiheadAttention`. A mask must
            come to the causal one or to none: nothing else can be said of packed sequences.
        attention: that of the layer, for its layout and sizes.
    """
    if key_padding_mask is None:
        return NO_PADDING
    traced = _why_traced(x)
    if traced is not None:
        return traced
    batch = _Batch.of(x, attention.batch_first)
    if batch is None or x.shape[-1] != attention.embed_dim:
        return _UNFIT_INPUT
    if not batch.fits(key_padding_mask):
        return _UNFIT_MASK if key_padding_mask.dtype == torch.bool else _FLOATING_MASK
    if not _is_square(mask, batch.length):
        return _OTHER_MASK
    facts = [key_padding_mask.any(), batch.is_padded_at_end(key_padding_mask), *_triangles(mask)]
    padded, at_end, *triangles = torch.stack(facts).tolist()
    causal = _causal(triangles, is_causal)
    if not padded:
        return NO_PADDING
    if not at_end:
        return _NOT_AT_END
    return _OTHER_MASK if causal is None else PackedSelf(*batch.pack(key_padding_mask), causal)


def find_cross(
    tgt: Tensor,
    memory: Tensor,
    masks: Masks,
    tgt_is_causal: bool,
    memory_is_causal: bool,
    attention: nn.MultiheadAttention,
    cross_attention: nn.MultiheadAttention,
) -> PackedCross | str:
    """As `find`, for the two inputs of a decoder; either mask may be absent, not both.

    Padding of `memory` may lie anywhere, unless `memory_is_causal` counts its positions: it is
    never a query, and the order of keys does not matter.
    """
    tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask = masks
    if memory_mask is not None:
        return _MEMORY_MASK
    given = [m for m in (tgt_key_padding_mask, memory_key_padding_mask) if m is not None]
    if not given:
        return NO_PADDING
    traced = _why_traced(tgt) or _why_traced(memory)
    if traced is not None:
        return traced
    queries = _Batch.of(tgt, attention.batch_first)
    keys = _Batch.of(memory, cross_attention.batch_first)
    if (
        tgt.shape[-1] != attention.embed_dim
        or tgt.dim() != memory.dim()
        or not memory.shape[-1] == cross_attention.kdim == cross_attention.vdim
        or queries is None
        or keys is None
        or queries.sequences != keys.sequences
    ):
        return _UNFIT_INPUT
    if not (queries.fits(tgt_key_padding_mask) and keys.fits(memory_key_padding_mask)):
        return _UNFIT_MASK if all(m.dtype == torch.bool for m in given) else _FLOATING_MASK
    if not _is_square(tgt_mask, queries.length):
        return _OTHER_MASK
    yes = torch.ones((), dtype=torch.bool, device=tgt.device)
    facts = [
        torch.stack([m.any() for m in given]).any(),
        yes if tgt_key_padding_mask is None else queries.is_padded_at_end(tgt_key_padding_mask),
        keys.is_padded_at_end(memory_key_padding_mask)
        if memory_is_causal and memory_key_padding_mask is not None
        else yes,
        *_triangles(tgt_mask),
    ]
    padded, tgt_at_end, memory_fits, *triangles = torch.stack(facts).tolist()
    causal = _causal(triangles, tgt_is_causal)
    if not padded:
        return NO_PADDING
    if not (tgt_at_end and memory_fits):
        return _NOT_AT_END
    if causal is None:
        return _OTHER_MASK
    return PackedCross(
        PackedSelf(*queries.pack(tgt_key_padding_mask), causal),
        *keys.pack(memory_key_padding_mask),
    )


def is_known_attention(module: Any) -> bool:
    """True if a call of `module` looks at no position that its masks hide."""
    return (
        type(module) is FusedMultiheadAttention
        and not has_hooks(module)
        and token_wise.is_token_wise(module.out_proj)
    )


def is_plain_attention(module: Any) -> bool:
    """True if `attend_packed` of `module` is all that a call of it does on packed sequences."""
    return is_known_attention(module) and module.bias_k is None and not module.add_zero_attn


def why_not_attention(name: str, module: Any) -> str:
    """What to tell a user of a module, called `name`, for which `is_plain_attention` is False."""
    if has_hooks(module) or type(module) is not FusedMultiheadAttention:
        return token_wise.why_not(name, module)
    if not token_wise.is_token_wise(module.out_proj):
        return token_wise.why_not(f"{name}.out_proj", module.out_proj)
    return f"`{name}` appends keys (add_bias_kv, add_zero_attn)"


class _Batch(NamedTuple):
    """Sizes and layout of a batch of sequences."""

    sequences: int
    length: int
    batch_first: bool
    shape: torch.Size  # (N, L), (L, N) or (L,)
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, batch_first: bool) -> _Batch | None:
        shape = x.shape[:-1]
        if len(shape) == 1:
            return cls(1, shape[0], True, shape, x.device)
        if len(shape) != 2:
            return None
        count, length = shape if batch_first else (shape[1], shape[0])
        return cls(count, length, batch_first, shape, x.device)

    def fits(self, mask: Tensor | None) -> bool:
        """True for a bool mask of this batch, or none."""
        if mask is None:
            return True
        expected = (self.length,) if len(self.shape) == 1 else (self.sequences, self.length)
        return mask.dtype == torch.bool and tuple(mask.shape) == expected

    def is_padded_at_end(self, mask: Tensor) -> Tensor:
        mask = mask.view(self.sequences, self.length)
        lengths = self.length - mask.sum(dim=1)
        at_end = torch.arange(self.length, device=mask.device) >= lengths[:, None]
        return (at_end == mask).all()

    def pack(self, mask: Tensor | None) -> tuple[Padding, Sequences]:
        if mask is None:
            starts = torch.arange(self.sequences + 1, dtype=torch.int32, device=self.device)
            sequences = Sequences(starts * self.length, self.length)
            return Padding(None, self.shape, self.batch_first), sequences
        keep = ~mask.view(self.sequences, self.length)
        sequence, position = torch.nonzero(keep, as_tuple=True)
        if self.batch_first:
            rows = sequence * self.length + position
        else:
            rows = position * self.sequences + sequence
        lengths = packing.cumulative(keep.sum(dim=1))
        return Padding(rows, self.shape, self.batch_first), Sequences(lengths, self.length)


def _is_square(mask: Tensor | None, length: int) -> bool:
    """True for a mask of one square that may be read: its values are all that there is to it."""
    if mask is None:
        return True
    return (
        tuple(mask.shape) == (length, length)
        and (mask.dtype == torch.bool or mask.is_floating_point())
        and not (mask.requires_grad and torch.is_grad_enabled())
        and _why_traced(mask) is None
    )


def _triangles(mask: Tensor | None) -> list[Tensor]:
    """Of a square mask: nothing hidden up to the diagonal; all hidden above it; nothing above."""
    if mask is None:
        return []
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    free = ~mask if mask.dtype == torch.bool else mask == 0
    above = torch.ones_like(hidden).triu_(1)
    return [(free | above).all(), (hidden | ~above).all(), (free | ~above).all()]


def _causal(triangles: list[bool], is_causal: bool) -> bool | None:
    """Whether mask and hint together are the causal mask (True), none (False) or another (None)."""
    if not triangles:
        return is_causal
    free_below, hidden_above, free_above = triangles
    if free_below and (is_causal or hidden_above):
        return True
    return False if free_below and free_above else None


def _why_traced(x: Tensor) -> str | None:
    """Why the values of x, or of a mask, cannot be read; None if they can."""
    if torch.compiler.is_compiling():
        return "compiled: shapes cannot depend on data"
    if x.is_meta:
        return "meta tensors hold no data"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "operators are traced or watched"
    if type(x) not in (Tensor, nn.Parameter):
        return "an input is of another class than torch.Tensor"
    if higher_order.needs_formula():
        return "inside a transform of torch.func, or torch.jit.trace"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return None
