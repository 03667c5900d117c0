"""From the tensors of a call to the launches of its kernels."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ....runtime.triton import device as triton_device
from ....runtime.triton import replay
from ....runtime.triton.rows import Result, dropout_of, rows_of, vector_of
from ..problem import Operands, Options, result_shape
from .kernels import _bias_activation_backward_kernel, _bias_activation_forward_kernel

_WIDE, _NARROW, _WARPS = (4, 512), (32, 64), 4
_BACKWARD_ROWS = {_WIDE[1]: 2, _NARROW[1]: 4}  # by columns; with more some case spills 8 bytes
_INTERPRETED = (64, 512)  # the interpreter's time goes by operations, whatever their size


def _tile(width: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile: wide loads where the rows are wide."""
    if triton_device.arch(device) == triton_device.INTERPRETER:
        return _INTERPRETED if width > 1 else _NARROW
    return _WIDE if width > _NARROW[1] else _NARROW


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    replay.run(_forward, (*operands, y), options)


def _forward(tensors: replay.Tensors, options: Options) -> None:
    *given, y = tensors
    operands = Operands(*given)
    x, bias, rng = operands
    *outer, width = result_shape(operands, options)
    num_rows = math.prod(outer)
    result = Result(y, (num_rows, width))
    rows, cols = _tile(width, x.device)
    with triton_device.on_device_of(x):
        triton_device.launch(
            _bias_activation_forward_kernel,
            triton.cdiv(num_rows, rows) * triton.cdiv(width, cols),
            *(rows_of(x, (num_rows, x.shape[-1])), vector_of(bias)),
            *(*dropout_of(rng, options.dropout_p), result.view, num_rows, width),
            *(options.activation, options.gated, rows, cols),
            warps=_WARPS,
            stages=1,
        )
        result.finish()


def backward(
    operands: Operands, options: Options, dy: Tensor, dx: Tensor | None, dbias: Tensor | None
) -> None:
    replay.run(_backward, (*operands, dy, dx, dbias), options)


def _backward(tensors: replay.Tensors, options: Options) -> None:
    *given, dy, dx, dbias = tensors
    operands = Operands(*given)
    x, bias, rng = operands
    *outer, width = result_shape(operands, options)
    num_rows, full_width = math.prod(outer), x.shape[-1]
    rows, cols = _tile(width, x.device)
    if (rows, cols) != _INTERPRETED:  # two values and two sums an element: fewer of them
        rows = _BACKWARD_ROWS[cols]
    tiles = triton.cdiv(width, cols)
    wanted = 4 * triton_device.multiprocessors(x.device)
    splits = max(1, min(triton.cdiv(num_rows, rows), triton.cdiv(wanted, max(tiles, 1))))
    sums = None
    if dbias is not None:
        sums = torch.zeros((splits, full_width), dtype=torch.float32, device=x.device)
    with triton_device.on_device_of(x):
        triton_device.launch(
            _bias_activation_backward_kernel,
            tiles * splits,
            *(rows_of(x, (num_rows, full_width)), vector_of(bias)),
            *(*dropout_of(rng, options.dropout_p), rows_of(dy, (num_rows, width))),
            *(rows_of(dx, (num_rows, full_width)), sums, num_rows, width, splits),
            *(options.activation, options.gated, rows, cols),
            warps=_WARPS,
            stages=1,
        )
        if dbias is not None and sums is not None:
            dbias.copy_(sums.sum(0))
