"""Launches for gradients that are sums over scores: of a bias, of what functions of pairs load."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ....runtime.triton import device as triton_device
from ..functions import Sum
from . import config
from .bias_gradient import _attention_bias_gradient_kernel
from .distance_gradient import _attention_distance_gradient_kernel
from .function_terms import Pairs, table_indices
from .launcher import Launcher
from .primitives import ScoreView


def sum_bias(
    launcher: Launcher, given: tuple[Any, ...], dweights: ScoreView | None, dbias: Tensor
) -> None:
    """Gradient of a bias."""
    plan = launcher.plan
    tile = config.tile("bias", launcher.problem)
    sizes = tuple(dbias.shape)
    whole = (plan.batch, plan.num_heads, plan.seqlen_q, plan.seqlen_k)
    if 0 in whole:
        return
    blocks = (1, 1, tile.block_m, tile.block_n)
    walks = [
        triton.cdiv(n, block) if size == 1 else 1
        for size, n, block in zip(sizes, whole, blocks, strict=True)
    ]
    owners = math.prod(map(triton.cdiv, sizes, blocks))
    splits = min(math.prod(walks), triton.cdiv(config.ENOUGH_PROGRAMS, owners))
    partial = dbias
    if splits > 1:
        partial = torch.empty((splits, *sizes), dtype=torch.float32, device=dbias.device)
    triton_device.launch(
        _attention_bias_gradient_kernel,
        owners * splits,
        *(*given, dweights, partial, *sizes, *walks, splits),
        *(launcher.unsplit_terms_of(tile), *plan.scalars),
        launcher.config(tile, SUM_ROWS=sizes[2] < whole[2], SUM_COLS=sizes[3] < whole[3]),
        warps=tile.warps,
        stages=tile.stages,
    )
    if splits > 1:
        torch.sum(partial, 0, out=dbias)


def sum_leaf(launcher: Launcher, pairs: Pairs, given: tuple[Any, ...], wanted: Sum) -> None:
    """Gradient of a leaf of functions: as that of a bias which is broadcast as the leaf is."""
    plan, total = launcher.plan, wanted.total
    leaf = pairs.functions.leaves[wanted.load.leaf]
    if leaf.place == "distance":
        _by_distance(launcher, given, total)
        return
    if leaf.place != "table":
        rows = plan.seqlen_q if leaf.place == "query" else 1
        cols = plan.seqlen_k if leaf.place == "key" else 1
        sum_bias(launcher, given, None, total.view(*total.shape[:2], rows, cols))
        return
    names = table_indices(wanted.load, pairs.functions.leaves)
    assert names is not None  # `why_not_gradient` asked
    sizes = (plan.batch, plan.num_heads, plan.seqlen_q, plan.seqlen_k)
    whole = dict(zip(("b", "h", "q_idx", "kv_idx"), sizes, strict=True))
    summed = torch.empty(
        [size if name in names else 1 for name, size in whole.items()],
        dtype=torch.float32,
        device=total.device,
    )
    sum_bias(launcher, given, None, summed)
    summed = summed.squeeze([n for n, name in enumerate(whole) if name not in names])
    present = [name for name in whole if name in names]
    summed = summed.permute([present.index(name) for name in names])
    total.zero_()[tuple(slice(0, size) for size in summed.shape)] = summed


def _by_distance(launcher: Launcher, given: tuple[Any, ...], total: Tensor) -> None:
    """Sums along diagonals, (B, H, Lq + Lk - 1), from query - key = 1 - Lk on."""
    plan = launcher.plan
    tile = config.tile("bias", launcher.problem)
    block = min(tile.block_m, tile.block_n)
    tile = tile._replace(block_m=block, block_n=block)
    tiles_m, tiles_n = triton.cdiv(plan.seqlen_q, block), triton.cdiv(plan.seqlen_k, block)
    shape = (plan.batch, plan.num_heads, tiles_m + tiles_n - 1, 2, block)
    partial = torch.empty(shape, dtype=torch.float32, device=total.device)
    triton_device.launch(
        _attention_distance_gradient_kernel,
        math.prod(shape[:3]),
        *(*given, partial, tiles_m, tiles_n),
        *(launcher.unsplit_terms_of(tile), *plan.scalars),
        launcher.config(tile),
        warps=tile.warps,
        stages=tile.stages,
    )
    # A diagonal's second half goes on where the first half of the next one starts.
    pad = torch.nn.functional.pad
    joined = pad(partial[..., 0, :], (0, 0, 0, 1)) + pad(partial[..., 1, :], (0, 0, 1, 0))
    first = tiles_n * block - plan.seqlen_k
    total.copy_(joined.flatten(2)[..., first : first + total.shape[2]])
