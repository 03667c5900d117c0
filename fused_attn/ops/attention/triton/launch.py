"""From the tensors of a call to the launches of its kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ....runtime.triton import device as triton_device
from ....runtime.triton import replay
from ..functions import PairFunctions
from ..problem import LOWER_RIGHT, Operands, Options
from . import config
from .backward import (
    _attention_backward_dkdv_kernel,
    _attention_backward_dq_kernel,
)
from .classify import classify
from .decode import _attention_combine_kernel, _attention_decode_kernel
from .forward import _attention_forward_kernel
from .function_terms import pairs_of
from .launcher import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    WEIGHTS_PRODUCTS,
    Launcher,
    has_far_rows,
    score_view,
    view_of,
)
from .primitives import RowStatistics, ScoreView
from .statistics import _attention_statistics_kernel
from .sums import sum_bias, sum_leaf
from .tiles import COMBINE, AttentionTile
from .weights import _attention_weights_delta_kernel, _attention_weights_kernel


def forward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor | None,
    functions: PairFunctions | None = None,
) -> None:
    if functions is None:
        replay.run(_plain_forward, (*operands, out, lse), options, _setting(operands))
    else:
        _run_forward(operands, options, out, lse, functions)


def _plain_forward(tensors: replay.Tensors, options: Options, _setting: str) -> None:
    *operands, out, lse = tensors
    _run_forward(Operands(*operands), options, out, lse, None)


def _setting(operands: Operands) -> str:
    """What else decides about the kernels of a call: a setting of torch's."""
    if operands[0].dtype != torch.float32:
        return ""
    return torch.backends.cuda.matmul.fp32_precision


def _run_forward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor | None,
    functions: PairFunctions | None,
) -> None:
    with triton_device.on_device_of(operands.q):
        pairs = None if functions is None else pairs_of(functions, operands.q)
        launcher = Launcher(operands, options, FORWARD_PRODUCTS, pairs=pairs)
        plan = launcher.plan
        far = has_far_rows(out)
        result = torch.empty(out.shape, dtype=out.dtype, device=out.device) if far else out
        if plan.packed:  # rows past the last sequence belong to nobody
            result.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)
        if plan.splits > 1:
            _decode(launcher, result, lse)
        else:
            if functions is not None:
                classify(launcher, operands, options, functions)
            _forward(launcher, result, lse)
        if far:
            out.copy_(result)


def _forward(launcher: Launcher, out: Tensor, lse: Tensor | None) -> None:
    q, k, v = launcher.operands[:3]
    plan = launcher.plan
    tensors = (view_of(q), view_of(k), view_of(v), view_of(out), lse)

    def run(tile: AttentionTile) -> None:
        num_tiles = -(-plan.seqlen_q // tile.block_m)
        triton_device.launch(
            _attention_forward_kernel,
            num_tiles * plan.num_heads * plan.batch,
            *tensors,
            *launcher.descriptors((q, tile.block_m), (k, tile.block_n), (v, tile.block_n)),
            *(launcher.terms_of(tile), *plan.scalars, num_tiles),
            launcher.config(tile),
            warps=tile.warps,
            stages=tile.stages,
        )

    launcher.launch_best("forward", run)


def _decode(launcher: Launcher, out: Tensor, lse: Tensor | None) -> None:
    q, k, v = launcher.operands[:3]
    plan, splits = launcher.plan, launcher.plan.splits
    rows = plan.batch * plan.num_heads * plan.seqlen_q
    block_dv = config.padded_size(v.shape[3])
    partial = torch.empty((rows, splits, block_dv), dtype=torch.float32, device=q.device)
    peaks = torch.empty((rows, splits), dtype=torch.float32, device=q.device)
    totals = torch.empty_like(peaks)
    shared = (*plan.scalars, splits, plan.seqlen_q)

    def run(tile: AttentionTile) -> None:
        triton_device.launch(
            _attention_decode_kernel,
            splits * plan.num_heads_kv * plan.batch,
            *(view_of(q), view_of(k), view_of(v), partial, peaks, totals),
            *(launcher.decode_terms_of(tile), *shared),
            launcher.config(tile),
            warps=tile.warps,
            stages=tile.stages,
        )

    launcher.launch_best("decode", run)
    triton_device.launch(
        _attention_combine_kernel,
        rows,
        *(partial, peaks, totals, view_of(out), lse, launcher.terms, *shared),
        launcher.config(COMBINE, SPLITS=config.MAX_SPLITS),
        warps=COMBINE.warps,
        stages=COMBINE.stages,
    )


def weights(
    operands: Operands, options: Options, lse: Tensor, weights: Tensor, average: bool
) -> None:
    replay.run(_weights, (*operands, lse, weights), options, average, _setting(operands))


def _weights(tensors: replay.Tensors, options: Options, average: bool, _setting: str) -> None:
    *given, lse, weights = tensors
    operands = Operands(*given)
    with triton_device.on_device_of(lse):
        launcher = Launcher(operands, options, WEIGHTS_PRODUCTS)
        plan = launcher.plan
        launcher.align(*operands[3:5], weights)
        tile = config.tile("weights", launcher.problem)
        tiles_m = triton.cdiv(plan.seqlen_q, tile.block_m)
        tiles_n = triton.cdiv(plan.seqlen_k, tile.block_n)
        triton_device.launch(
            _attention_weights_kernel,
            tiles_m * tiles_n * weights.shape[0] * weights.shape[1],
            *(
                view_of(operands.q),
                view_of(operands.k),
                _statistics(launcher, lse),
                score_view(weights, plan.seqlen_k),
            ),
            *(launcher.terms_of(tile), *plan.scalars, tiles_m, tiles_n),
            launcher.config(tile, AVERAGE=average),
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
    functions: PairFunctions | None = None,
) -> None:
    if functions is None:
        tensors = (*operands, out, lse, dout, dlse, dweights, *grads)
        replay.run(_plain_backward, tensors, options, _setting(operands))
    else:
        _run_backward(operands, options, out, lse, dout, dlse, dweights, grads, functions)


def _plain_backward(tensors: replay.Tensors, options: Options, _setting: str) -> None:
    count = len(Operands._fields)
    out, lse, dout, dlse, dweights, *grads = tensors[count:]
    operands = Operands(*tensors[:count])
    _run_backward(operands, options, out, lse, dout, dlse, dweights, tuple(grads), None)


def _run_backward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
    grads: tuple[Tensor | None, ...],
    functions: PairFunctions | None,
) -> None:
    dq, dk, dv, dbias = grads
    if functions is not None or _may_see_nothing(
        operands, options
    ):  # such a row may have any gradient, and 0 * NaN is NaN
        dout = torch.where((lse == -math.inf)[..., None], 0.0, dout)
    with triton_device.on_device_of(out):
        pairs = None if functions is None else pairs_of(functions, operands.q, functions.slope)
        launcher = Launcher(operands, options, BACKWARD_PRODUCTS, dweights, pairs)
        if functions is not None:
            classify(launcher, operands, options, functions)
        if launcher.plan.packed:
            for grad in (dq, dk, dv):
                if grad is not None:
                    grad.zero_()
        statistics = _statistics(launcher, lse, (out, dout, dlse))
        given = (*map(view_of, (*operands[:3], dout)), statistics)
        shares = score_view(dweights, launcher.plan.seqlen_k)
        if shares is not None:
            _add_weights_to_delta(launcher, given, shares)
        _keys_and_values(launcher, given, shares, dk, dv)
        _queries(launcher, given, shares, dq)
        if dbias is not None:
            sum_bias(launcher, given, shares, dbias)
        if functions is None:
            return
        for wanted in functions.sums:
            own = pairs_of(functions, operands.q, wanted.part)
            of_leaf = Launcher(operands, options, BACKWARD_PRODUCTS, None, own)
            of_leaf.classes = launcher.classes
            sum_leaf(of_leaf, own, given, wanted)


def _may_see_nothing(operands: Operands, options: Options) -> bool:
    """Whether there may be a query that sees no key.

    Asked here and not in the kernel: a choice on its tiles of dout costs registers, which spill.
    """
    hiding = ("bias", "mask", "key_padding_mask", "key_lengths", "cu_seqlens_q", "query_documents")
    if any(getattr(operands, name) is not None for name in hiding) or options.chunk:
        return True
    beyond = options.causal == LOWER_RIGHT and options.max_seqlen_q > options.max_seqlen_k
    return beyond or max(options.window_left, options.window_right) >= 0


def _statistics(
    launcher: Launcher, lse: Tensor, gradients: tuple[Tensor | None, ...] = (None, None, None)
) -> RowStatistics:
    """What probabilities are recomputed from.

    Args:
        gradients: out and the gradients of out and lse; with them delta comes along.
    """
    anchor, log = torch.empty_like(lse), torch.empty_like(lse)
    delta = None if gradients[0] is None else torch.empty_like(lse)
    noisy = torch.empty(lse.shape, dtype=torch.int8, device=lse.device)
    statistics = RowStatistics(anchor, log, delta, noisy)
    *tensors, dlse = gradients
    given = (
        *map(view_of, (*launcher.operands[:2], *tensors)),
        score_view(dlse, 0),
        lse,
        statistics,
    )
    plain = launcher.operands.bias is None and launcher.pairs is None
    name = "statistics" if plain else "weights"
    tile = config.tile(name, launcher.problem)
    _launch_by_rows(launcher, _attention_statistics_kernel, tile, *given)
    return statistics


def _launch_by_rows(launcher: Launcher, kernel: Any, tile: AttentionTile, *tensors: Any) -> None:
    """A kernel whose programs own tiles of queries."""
    plan = launcher.plan
    num_tiles = triton.cdiv(plan.seqlen_q, tile.block_m)
    triton_device.launch(
        kernel,
        num_tiles * plan.num_heads * plan.batch,
        *(*tensors, launcher.terms_of(tile), *plan.scalars, num_tiles, launcher.config(tile)),
        warps=tile.warps,
        stages=tile.stages,
    )


def _add_weights_to_delta(launcher: Launcher, given: tuple[Any, ...], dweights: ScoreView) -> None:
    q, k, _, _, statistics = given
    tile = config.tile("weights", launcher.problem)
    _launch_by_rows(launcher, _attention_weights_delta_kernel, tile, q, k, statistics, dweights)


def _keys_and_values(
    launcher: Launcher,
    given: tuple[Any, ...],
    dweights: ScoreView | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    if dk is None and dv is None:
        return
    plan = launcher.plan

    def run(tile: AttentionTile) -> None:
        num_tiles = -(-plan.seqlen_k // tile.block_n)
        triton_device.launch(
            _attention_backward_dkdv_kernel,
            num_tiles * plan.num_heads_kv * plan.batch,
            *(*given, view_of(dk), view_of(dv), dweights),
            *(launcher.terms_of(tile, of_keys=True), *plan.scalars),
            *(num_tiles, launcher.config(tile)),
            warps=tile.warps,
            stages=tile.stages,
        )

    launcher.launch_best("dkdv", run)


def _queries(
    launcher: Launcher, given: tuple[Any, ...], dweights: ScoreView | None, dq: Tensor | None
) -> None:
    if dq is None:
        return
    plan = launcher.plan

    def run(tile: AttentionTile) -> None:
        num_tiles = -(-plan.seqlen_q // tile.block_m)
        triton_device.launch(
            _attention_backward_dq_kernel,
            num_tiles * plan.num_heads * plan.batch,
            *(*given, view_of(dq), dweights),
            *(launcher.terms_of(tile), *plan.scalars, num_tiles),
            launcher.config(tile),
            warps=tile.warps,
            stages=tile.stages,
        )

    launcher.launch_best("dq", run)
