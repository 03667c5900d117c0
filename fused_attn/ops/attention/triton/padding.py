"""Where the visible keys of a padding mask lie: one program scans one batch element."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....runtime.triton import device as triton_device
from .primitives import ROW_UNIT


@triton.jit(do_not_specialize=["stride_b", "stride_k", "seqlen_k"])
def _key_ranges_kernel(padding, copy, ranges, stride_b, stride_k, seqlen_k, BLOCK: tl.constexpr):
    batch = tl.program_id(0)
    first = seqlen_k
    end = seqlen_k * 0
    count = seqlen_k * 0
    row = padding + batch.to(tl.int64) * stride_b
    target = copy + batch.to(tl.int64) * (tl.cdiv(seqlen_k, ROW_UNIT) * ROW_UNIT)
    for n0 in tl.range(0, seqlen_k, BLOCK):
        col = n0 + tl.arange(0, BLOCK)
        present = tl.load(row + col.to(tl.int64) * stride_k, mask=col < seqlen_k, other=0)
        tl.store(target + col, present, mask=col < seqlen_k)
        first = tl.minimum(first, tl.min(tl.where(present != 0, col, seqlen_k), 0))
        end = tl.maximum(end, tl.max(tl.where(present != 0, col + 1, 0), 0))
        count += tl.sum((present != 0).to(tl.int32), 0)
    tl.store(ranges + batch * 3, tl.minimum(first, end))
    tl.store(ranges + batch * 3 + 1, end)
    tl.store(ranges + batch * 3 + 2, (count != end - first).to(tl.int32) * (count != 0))


class Padding(NamedTuple):
    """A padding mask as the kernels of attention take it."""

    copy: Tensor  # (B, Lk rounded up to ROW_UNIT) uint8: its strides tell nothing of Lk
    ranges: Tensor  # (B, 3) int32: first visible key, past the last one, whether one is between


def padding_of(key_padding_mask: Tensor | None) -> Padding | tuple[None, None]:
    """Scan a padding mask."""
    if key_padding_mask is None:
        return None, None
    batch, seqlen_k = key_padding_mask.shape
    device = key_padding_mask.device
    unit = ROW_UNIT.value
    copy = torch.empty((batch, -(-seqlen_k // unit) * unit), dtype=torch.uint8, device=device)
    ranges = torch.empty((batch, 3), dtype=torch.int32, device=device)
    padding = key_padding_mask.view(torch.uint8)
    with triton_device.on_device_of(padding):
        triton_device.launch(
            _key_ranges_kernel,
            batch,
            *(padding, copy, ranges, *padding.stride(), seqlen_k, 1024),
            warps=4,
            stages=1,
        )
    return Padding(copy, ranges)
