"""From the tensors of a call to the launches of its kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from ....runtime.triton import device as triton_device
from ....runtime.triton import replay
from ....runtime.triton.rows import Dropout, Result, View, dropout_of, rows_of, vector_of
from ..problem import Operands, Options, sum_dtype
from . import config
from .backward import (
    _layer_norm_backward_columns_kernel,
    _layer_norm_backward_kernel,
    _layer_norm_backward_wide_kernel,
)
from .forward import _layer_norm_forward_kernel

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_SPLITS = 32  # programs that share the columns of wide rows


def _shape(x: Tensor, options: Options) -> tuple[int, int]:
    """(rows, width) of a call."""
    first = x.dim() - options.dims
    return math.prod(x.shape[:first]), math.prod(x.shape[first:])


def forward(
    operands: Operands,
    options: Options,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    replay.run(_forward, (*operands, y, h, mean, rstd), options)


def _forward(tensors: replay.Tensors, options: Options) -> None:
    *given, y, h, mean, rstd = tensors
    operands = Operands(*given)
    x, residual, weight, bias, _ = operands
    shape = num_rows, width = _shape(x, options)
    device = x.device
    results = [Result(result, shape) for result in (y, h)]
    tile = config.tile(width, triton_device.arch(device))
    with triton_device.on_device_of(x):
        triton_device.launch(
            _layer_norm_forward_kernel,
            triton.cdiv(num_rows, tile.rows),
            *(rows_of(x, shape), rows_of(residual, shape), vector_of(weight), vector_of(bias)),
            *(
                *dropout_of(operands.dropout_rng, options.dropout_p),
                *[result.view for result in results],
                mean,
                rstd,
            ),
            *(num_rows, width, options.eps, _DTYPES[sum_dtype(operands)], tile.rows, tile.cols),
            *(options.rms, tile.fits(width)),
            warps=tile.warps,
            stages=1,
        )
        for result in results:
            result.finish()


def backward(
    operands: Operands,
    options: Options,
    summed: bool,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> None:
    replay.run(_backward, (*operands, mean, rstd, dy, dh, *grads), options, summed)


def _backward(tensors: replay.Tensors, options: Options, summed: bool) -> None:
    count = len(Operands._fields)
    operands, grads = Operands(*tensors[:count]), tensors[-4:]
    mean, rstd, dy, dh = tensors[count:-4]
    x, residual, weight, _, _ = operands
    shape = _, width = _shape(x, options)
    dropout = dropout_of(operands.dropout_rng, options.dropout_p)
    given = (rows_of(x, shape), None if summed else rows_of(residual, shape))
    dtype = x.dtype if summed else sum_dtype(operands)
    rows = (mean, rstd, rows_of(dy, shape))
    dx, dresidual = (rows_of(grad, shape) for grad in grads[:2])
    device = x.device
    whole = config.tile(width, triton_device.arch(device)).fits(width)
    walk = _walk_whole if whole else _walk_wide
    with triton_device.on_device_of(x):
        flags = (summed, _DTYPES[dtype])
        partial = walk(
            given, vector_of(weight), dropout, rows, rows_of(dh, shape), (dx, dresidual), grads[2:],
            shape, flags,
        )  # fmt: skip
        for grad, sums in zip(grads[2:], partial, strict=True):
            if grad is not None and sums is not None:
                grad.copy_(sums.sum(0).view(grad.shape))


def _partials(grads: tuple[Tensor | None, ...], count: int, width: int) -> list[Tensor | None]:
    return [
        None
        if grad is None
        else torch.empty((count, width), dtype=torch.float32, device=grad.device)
        for grad in grads
    ]


def _walk_whole(
    given: tuple[Any, ...],
    weight: View | None,
    dropout: Dropout,
    rows: tuple[Any, ...],
    dh: View | None,
    outputs: tuple[Any, ...],
    parameter_grads: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    flags: tuple[Any, ...],
) -> list[Tensor | None]:
    """Everything in one kernel; the partial sums of the parameters' gradients."""
    num_rows, width = shape
    device = rows[1].device
    tile = config.tile(width, triton_device.arch(device), backward=True)
    programs = config.programs(
        num_rows, width, triton_device.arch(device), triton_device.multiprocessors(device)
    )
    partial = _partials(parameter_grads, programs, width)
    triton_device.launch(
        _layer_norm_backward_kernel,
        programs,
        *(*given, weight, *dropout, *rows, dh, *outputs, *partial, num_rows, width),
        *(*flags, tile.rows, tile.cols),
        warps=tile.warps,
        stages=1,
    )
    return partial


def _walk_wide(
    given: tuple[Any, ...],
    weight: View | None,
    dropout: Dropout,
    rows: tuple[Any, ...],
    dh: View | None,
    outputs: tuple[Any, ...],
    parameter_grads: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    flags: tuple[Any, ...],
) -> list[Tensor | None]:
    """The same for rows that no tile holds: rows in one kernel, columns in another."""
    num_rows, width = shape
    device = rows[1].device
    tile = config.tile(width, triton_device.arch(device), backward=True)
    if any(output is not None for output in outputs):
        triton_device.launch(
            _layer_norm_backward_wide_kernel,
            num_rows,
            *(*given, weight, *dropout, *rows, dh, *outputs, num_rows, width, *flags, tile.cols),
            warps=tile.warps,
            stages=1,
        )
    partial = _partials(parameter_grads, _SPLITS, width)
    if any(sums is not None for sums in partial):
        part = config.tile(256, triton_device.arch(device))
        triton_device.launch(
            _layer_norm_backward_columns_kernel,
            _SPLITS * triton.cdiv(width, part.cols),
            *(*given, *dropout, *rows, *partial, num_rows, width),
            *(*flags, part.rows, part.cols, _SPLITS),
            warps=part.warps,
            stages=1,
        )
    return partial
