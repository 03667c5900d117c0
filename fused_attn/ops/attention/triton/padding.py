"""Where the visible keys of a padding mask lie: one program scans one batch element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....runtime.triton import device as triton_device
from ....runtime.triton.rows import View


@triton.jit(do_not_specialize=["seqlen_k"])
def _key_ranges_kernel(padding, ranges, seqlen_k, BLOCK: tl.constexpr):
    batch = tl.program_id(0)
    first = seqlen_k
    end = seqlen_k * 0
    count = seqlen_k * 0
    row = padding.ptr + batch.to(tl.int64) * padding.strides[0]
    for n0 in tl.range(0, seqlen_k, BLOCK):
        col = n0 + tl.arange(0, BLOCK)
        present = tl.load(row + col.to(tl.int64) * padding.strides[1], mask=col < seqlen_k, other=0)
        first = tl.minimum(first, tl.min(tl.where(present != 0, col, seqlen_k), 0))
        end = tl.maximum(end, tl.max(tl.where(present != 0, col + 1, 0), 0))
        count += tl.sum((present != 0).to(tl.int32), 0)
    tl.store(ranges + batch * 3, tl.minimum(first, end))
    tl.store(ranges + batch * 3 + 1, end)
    tl.store(ranges + batch * 3 + 2, (count != end - first).to(tl.int32) * (count != 0))


def key_ranges(key_padding_mask: Tensor | None) -> Tensor | None:
    """(B, 3) int32: first visible key, past the last one, whether one between them is hidden."""
    if key_padding_mask is None:
        return None
    batch, seqlen_k = key_padding_mask.shape
    ranges = torch.empty((batch, 3), dtype=torch.int32, device=key_padding_mask.device)
    padding = key_padding_mask.view(torch.uint8)
    with triton_device.on_device_of(padding):
        triton_device.launch(
            _key_ranges_kernel,
            batch,
            *(View(padding, padding.stride()), ranges, seqlen_k, 1024),
            warps=4,
            stages=1,
        )
    return ranges
