"""From the tensors of a call to the launches of its kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ....runtime.triton import device as triton_device
from ..problem import Operands, Options
from . import config
from .backward import (
    _attention_backward_dkdv_kernel,
    _attention_backward_dq_kernel,
    _attention_delta_kernel,
)
from .bias_gradient import _attention_bias_gradient_kernel
from .call import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    WEIGHTS_PRODUCTS,
    Call,
    broadcast_view,
    view_of,
)
from .decode import _attention_combine_kernel, _attention_decode_kernel
from .forward import _attention_forward_kernel
from .primitives import Rows, View
from .statistics import _attention_refine_kernel
from .tiles import COMBINE, Tile
from .weights import _attention_weights_delta_kernel, _attention_weights_kernel


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    with triton_device.on_device_of(operands.q):
        call = Call(operands, options, FORWARD_PRODUCTS)
        plan = call.plan
        if plan.packed:  # rows past the last sequence belong to nobody
            out.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)
        if plan.splits > 1:
            _decode(call, out, lse)
        else:
            _forward(call, out, lse)


def _forward(call: Call, out: Tensor, lse: Tensor | None) -> None:
    q, k, v = call.operands[:3]
    plan = call.plan
    tensors = (view_of(q), view_of(k), view_of(v), view_of(out), lse)

    def run(tile: Tile) -> None:
        num_tiles = -(-plan.seqlen_q // tile.block_m)
        triton_device.launch(
            _attention_forward_kernel,
            num_tiles * plan.num_heads * plan.batch,
            *tensors,
            *call.descriptors((q, tile.block_m), (k, tile.block_n), (v, tile.block_n)),
            *(call.terms_of(tile), plan.sizes, plan.scalars, num_tiles),
            call.config(tile),
            warps=tile.warps,
            stages=tile.stages,
        )

    call.launch_best("forward", run)


def _decode(call: Call, out: Tensor, lse: Tensor | None) -> None:
    q, k, v = call.operands[:3]
    plan, splits = call.plan, call.plan.splits
    rows = plan.batch * plan.num_heads * plan.seqlen_q
    block_dv = config.padded_size(v.shape[3])
    partial = torch.empty((rows, splits, block_dv), dtype=torch.float32, device=q.device)
    peaks = torch.empty((rows, splits), dtype=torch.float32, device=q.device)
    totals = torch.empty_like(peaks)
    shared = (plan.sizes, plan.scalars, splits, plan.seqlen_q)

    def run(tile: Tile) -> None:
        triton_device.launch(
            _attention_decode_kernel,
            splits * plan.num_heads_kv * plan.batch,
            *(view_of(q), view_of(k), view_of(v), partial, peaks, totals),
            *(call.decode_terms_of(tile), *shared),
            call.config(tile),
            warps=tile.warps,
            stages=tile.stages,
        )

    call.launch_best("decode", run)
    triton_device.launch(
        _attention_combine_kernel,
        rows,
        *(partial, peaks, totals, view_of(out), lse, call.terms, *shared),
        call.config(COMBINE, SPLITS=triton.next_power_of_2(splits)),
        warps=COMBINE.warps,
        stages=COMBINE.stages,
    )


def weights(
    operands: Operands, options: Options, lse: Tensor, weights: Tensor, average: bool
) -> None:
    with triton_device.on_device_of(lse):
        call = Call(operands, options, WEIGHTS_PRODUCTS)
        plan = call.plan
        tile = config.tile("weights", plan.kind)
        tiles_m = triton.cdiv(plan.seqlen_q, tile.block_m)
        tiles_n = triton.cdiv(plan.seqlen_k, tile.block_n)
        triton_device.launch(
            _attention_weights_kernel,
            tiles_m * tiles_n * weights.shape[0] * weights.shape[1],
            *(view_of(operands.q), view_of(operands.k), _rows(call, lse, None), view_of(weights)),
            *(call.terms_of(tile), plan.sizes, plan.scalars, tiles_m, tiles_n),
            call.config(tile, AVERAGE=average),
            warps=tile.warps,
            stages=tile.stages,
        )


def backward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> None:
    dq, dk, dv, dbias = grads
    with triton_device.on_device_of(out):
        call = Call(operands, options, BACKWARD_PRODUCTS, dweights)
        if call.plan.packed:
            for grad in (dq, dk, dv):
                if grad is not None:
                    grad.zero_()
        delta = _delta(call, out, dout, dlse)
        given = (*map(view_of, (*operands[:3], dout)), _rows(call, lse, delta))
        shares = broadcast_view(dweights)
        if shares is not None:
            _add_weights_to_delta(call, given, shares)
        _keys_and_values(call, given, shares, dk, dv)
        _queries(call, given, shares, dq)
        if dbias is not None:
            _bias(call, given, shares, dbias)


def _rows(call: Call, lse: Tensor, delta: Tensor | None) -> Rows:
    """Statistics of the softmax; a bias may make lse too coarse, so it is looked at first."""
    q, k = call.operands[:2]
    if call.operands.bias is None:
        return Rows(lse, None, delta)
    peaks, weights = torch.empty_like(lse), torch.empty_like(lse)
    _launch_by_rows(call, _attention_refine_kernel, view_of(q), view_of(k), lse, peaks, weights)
    return Rows(peaks, weights, delta)


def _launch_by_rows(call: Call, kernel: Any, *tensors: Any) -> None:
    """A kernel whose programs own tiles of queries, and that has one tile a head size."""
    plan = call.plan
    tile = config.tile("weights", plan.kind)
    num_tiles = triton.cdiv(plan.seqlen_q, tile.block_m)
    triton_device.launch(
        kernel,
        num_tiles * plan.num_heads * plan.batch,
        *(*tensors, call.terms_of(tile), plan.sizes, plan.scalars, num_tiles, call.config(tile)),
        warps=tile.warps,
        stages=tile.stages,
    )


def _delta(call: Call, out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    batch, num_heads, seqlen_q, head_dim_v = out.shape
    delta = torch.empty((batch, num_heads, seqlen_q), dtype=torch.float32, device=out.device)
    rows = config.delta_rows(head_dim_v)
    triton_device.launch(
        _attention_delta_kernel,
        triton.cdiv(seqlen_q, rows) * num_heads * batch,
        *(view_of(out), view_of(dout), view_of(dlse), delta, seqlen_q, num_heads),
        *(head_dim_v, config.padded_size(head_dim_v), rows),
        warps=4,
        stages=1,
    )
    return delta


def _add_weights_to_delta(call: Call, given: tuple[Any, ...], dweights: View) -> None:
    q, k, _, _, rows = given
    _launch_by_rows(call, _attention_weights_delta_kernel, q, k, rows, dweights)


def _keys_and_values(
    call: Call, given: tuple[Any, ...], dweights: View | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    if dk is None and dv is None:
        return
    plan = call.plan

    def run(tile: Tile) -> None:
        num_tiles = -(-plan.seqlen_k // tile.block_n)
        triton_device.launch(
            _attention_backward_dkdv_kernel,
            num_tiles * plan.num_heads_kv * plan.batch,
            *(*given, view_of(dk), view_of(dv), dweights),
            *(call.terms_of(tile, of_keys=True), plan.sizes, plan.scalars),
            *(num_tiles, call.config(tile)),
            warps=tile.warps,
            stages=tile.stages,
        )

    call.launch_best("dkdv", run)


def _queries(call: Call, given: tuple[Any, ...], dweights: View | None, dq: Tensor | None) -> None:
    if dq is None:
        return
    plan = call.plan

    def run(tile: Tile) -> None:
        num_tiles = -(-plan.seqlen_q // tile.block_m)
        triton_device.launch(
            _attention_backward_dq_kernel,
            num_tiles * plan.num_heads * plan.batch,
            *(*given, view_of(dq), dweights),
            *(call.terms_of(tile), plan.sizes, plan.scalars, num_tiles),
            call.config(tile),
            warps=tile.warps,
            stages=tile.stages,
        )

    call.launch_best("dq", run)


def _bias(call: Call, given: tuple[Any, ...], dweights: View | None, dbias: Tensor) -> None:
    plan = call.plan
    tile = config.tile("bias", plan.kind)
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
        *(*given, dweights, partial, sizes, (*walks, splits)),
        *(call.terms_of(tile), plan.sizes, plan.scalars),
        call.config(tile, SUM_ROWS=sizes[2] == 1, SUM_COLS=sizes[3] == 1),
        warps=tile.warps,
        stages=tile.stages,
    )
    if splits > 1:
        torch.sum(partial, 0, out=dbias)
