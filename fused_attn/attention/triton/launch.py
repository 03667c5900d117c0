"""From the tensors of a call to the launches of its kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import philox, triton_runtime
from ..problem import LOWER_RIGHT, NONE, Operands, Options
from . import config
from .backward import (
    _attention_backward_dkdv_kernel,
    _attention_backward_dq_kernel,
    _attention_delta_kernel,
)
from .bias_gradient import _attention_bias_gradient_kernel
from .decode import _attention_combine_kernel, _attention_decode_kernel
from .forward import _attention_forward_kernel
from .padding import key_ranges
from .primitives import Rows, Scalars, Sizes, Terms, View
from .statistics import _attention_refine_kernel
from .weights import _attention_weights_delta_kernel, _attention_weights_kernel

_UNLIMITED = 1 << 30


class Config:
    """The compile-time numbers of a kernel, as the attributes of one constant."""

    def __init__(self, **values: Any) -> None:
        self._text = ", ".join(f"{name}={value}" for name, value in values.items())
        for name, value in values.items():
            setattr(self, name, tl.constexpr(value))

    def __repr__(self) -> str:
        return f"Config({self._text})"


@functools.cache  # one object a configuration: Triton looks kernels up by it
def _config(tile: config.Tile, **values: Any) -> Config:
    return Config(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **values)


def _view(tensor: Tensor | None) -> View | None:
    if tensor is None:
        return None
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    return View(tensor, tensor.stride())


def _broadcast_view(tensor: Tensor | None) -> View | None:
    """A view that takes any index in a dimension of size 1."""
    view = _view(tensor)
    if tensor is None or view is None:
        return None
    strides = zip(tensor.shape, view.strides, strict=True)
    return View(view.ptr, tuple([0 if size == 1 else stride for size, stride in strides]))


def _terms(operands: Operands) -> Terms:
    return Terms(
        bias=_broadcast_view(operands.bias),
        mask=_broadcast_view(operands.mask),
        padding=_view(operands.key_padding_mask),
        key_ranges=key_ranges(operands.key_padding_mask),
        key_lengths=_view(operands.key_lengths),
        alibi_slopes=_view(operands.alibi_slopes),
        cu_seqlens_q=operands.cu_seqlens_q,
        cu_seqlens_k=operands.cu_seqlens_k,
        rng=operands.rng,
    )


class Call:
    """What all kernels of one call share."""

    def __init__(
        self, operands: Operands, options: Options, dweights: Tensor | None = None
    ) -> None:
        q, k = operands.q, operands.k
        self.operands, self.options = operands, options
        head_dim = max(q.shape[3], operands.v.shape[3])
        heavy = (operands.bias, operands.mask, operands.key_padding_mask, operands.rng, dweights)
        pressure = sum(x is not None for x in heavy) + (options.softcap > 0)
        self.kind = config.Kind(
            head_dim,
            q.element_size(),
            triton_runtime.arch(q.device),
            pressure,
            triton_runtime.shared_memory(q.device),
        )
        self.packed = operands.cu_seqlens_q is not None
        self.batch = q.shape[0]
        if operands.cu_seqlens_q is not None:
            self.batch = operands.cu_seqlens_q.shape[0] - 1
        self.num_heads, self.num_heads_kv = q.shape[1], k.shape[1]
        self.seqlen_q = options.max_seqlen_q if self.packed else q.shape[2]
        self.seqlen_k = options.max_seqlen_k if self.packed else k.shape[2]
        self.sizes = Sizes(
            self.num_heads, self.num_heads // self.num_heads_kv, q.shape[2], k.shape[2]
        )
        self.terms = _terms(operands)
        self.scalars = _scalars(options)

    def config(self, tile: config.Tile, **more: Any) -> Config:
        """Compile-time constants of a kernel of this call."""
        o, operands = self.options, self.operands
        head_dim, head_dim_v = operands.q.shape[3], operands.v.shape[3]
        modified = (operands.bias, operands.mask, operands.alibi_slopes)
        return _config(
            tile,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            BLOCK_D=config.padded_size(head_dim),
            BLOCK_DV=config.padded_size(head_dim_v),
            BAND=o.causal != NONE or o.window_left >= 0 or o.window_right >= 0,
            SOFTCAP=o.softcap > 0,
            # The short path scales after the maximum, which takes a positive scale.
            MODIFIED=o.softcap > 0 or o.scale <= 0 or any(x is not None for x in modified),
            PRECISION=_precision(operands.q.dtype),
            **more,
        )

    def descriptors(self, *tensors: tuple[Tensor, int]) -> tuple[Any, ...]:
        """Tensor descriptors of (tensor, rows of a tile), all of them or none."""
        long_enough = min(self.seqlen_q, self.seqlen_k) >= config.DESCRIPTOR_SEQLEN
        if not (long_enough and config.has_descriptors(self.kind.arch, self.kind.itemsize)):
            return (None,) * len(tensors)
        if not all(_can_describe(tensor) for tensor, _ in tensors):
            return (None,) * len(tensors)
        return tuple([_descriptor(tensor, rows) for tensor, rows in tensors])


def _can_describe(tensor: Tensor) -> bool:
    """What the hardware asks of a tensor that it copies tiles of: multiples of 16 bytes."""
    *outer, inner = tensor.stride()
    size = tensor.element_size()
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride in outer)
    return inner == 1 and aligned and tensor.data_ptr() % 16 == 0


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    block = [1, 1, rows, config.padded_size(tensor.shape[3])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _scalars(options: Options) -> Scalars:
    left = options.window_left if options.window_left >= 0 else _UNLIMITED
    right = options.window_right if options.window_right >= 0 else _UNLIMITED
    if options.causal != NONE:
        right = 0
    drop_all = options.dropout_p >= 1.0
    threshold = 0 if drop_all else philox.threshold(options.dropout_p)
    return Scalars(
        scale=options.scale,
        softcap=options.softcap,
        left=min(left, _UNLIMITED),
        right=min(right, _UNLIMITED),
        lower_right=int(options.causal in (NONE, LOWER_RIGHT)),
        threshold=threshold - (1 << 32 if threshold >= 1 << 31 else 0),
        keep_scale=0.0 if drop_all else 1.0 / (1.0 - options.dropout_p),
    )


def _precision(dtype: torch.dtype) -> str:
    """How float32 matrices are multiplied: by torch's own setting for CUDA.

    Where nothing is set this is 3xTF32, as in torch's memory-efficient attention: nearly float32's
    accuracy on the tensor cores.
    """
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    return {"tf32": "tf32", "ieee": "ieee"}.get(setting, "tf32x3")


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    call = Call(operands, options)
    q, k, v = operands[:3]
    if call.packed:  # rows past the last sequence belong to nobody
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
    splits = _decode_splits(call)
    if splits > 1:
        _decode(call, out, lse, splits)
        return
    tile = config.tile("forward", call.kind)
    num_tiles = triton.cdiv(call.seqlen_q, tile.block_m)
    with triton_runtime.on_device_of(q):
        triton_runtime.launch(
            _attention_forward_kernel,
            num_tiles * call.num_heads * call.batch,
            *(_view(q), _view(k), _view(v), _view(out), lse),
            *call.descriptors((q, tile.block_m), (k, tile.block_n), (v, tile.block_n)),
            *(call.terms, call.sizes, call.scalars, num_tiles, call.config(tile)),
            warps=tile.warps,
            stages=tile.stages,
        )


def _decode_splits(call: Call) -> int:
    """How many programs share the keys of one key head; 1: the usual kernel."""
    rows = call.seqlen_q * call.sizes.group
    planes = call.num_heads_kv * call.batch
    device = call.operands.q.device
    multiprocessors = triton_runtime.multiprocessors(device)
    return config.decode_splits(rows, call.seqlen_k, planes, multiprocessors)


def _decode(call: Call, out: Tensor, lse: Tensor | None, splits: int) -> None:
    q, k, v = call.operands[:3]
    tile = config.decode_tile(call.seqlen_q * call.sizes.group, call.kind)
    rows = call.batch * call.num_heads * call.seqlen_q
    block_dv = config.padded_size(v.shape[3])
    partial = torch.empty((rows, splits, block_dv), dtype=torch.float32, device=q.device)
    peaks = torch.empty((rows, splits), dtype=torch.float32, device=q.device)
    totals = torch.empty_like(peaks)
    shared = (call.terms, call.sizes, call.scalars, splits, call.seqlen_q)
    with triton_runtime.on_device_of(q):
        triton_runtime.launch(
            _attention_decode_kernel,
            splits * call.num_heads_kv * call.batch,
            *(_view(q), _view(k), _view(v), partial, peaks, totals, *shared, call.config(tile)),
            warps=tile.warps,
            stages=tile.stages,
        )
        triton_runtime.launch(
            _attention_combine_kernel,
            rows,
            *(partial, peaks, totals, _view(out), lse, *shared),
            call.config(tile, SPLITS=triton.next_power_of_2(splits)),
            warps=4,
            stages=1,
        )


def weights(
    operands: Operands, options: Options, lse: Tensor, weights: Tensor, average: bool
) -> None:
    call = Call(operands, options)
    tile = config.tile("weights", call.kind)
    tiles_m = triton.cdiv(call.seqlen_q, tile.block_m)
    tiles_n = triton.cdiv(call.seqlen_k, tile.block_n)
    with triton_runtime.on_device_of(lse):
        triton_runtime.launch(
            _attention_weights_kernel,
            tiles_m * tiles_n * weights.shape[0] * weights.shape[1],
            *(_view(operands.q), _view(operands.k), _rows(call, lse, None), _view(weights)),
            *(call.terms, call.sizes, call.scalars, tiles_m, tiles_n),
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
    call = Call(operands, options, dweights)
    dq, dk, dv, dbias = grads
    if call.packed:
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
    with triton_runtime.on_device_of(out):
        delta = _delta(call, out, dout, dlse)
        given = (*map(_view, (*operands[:3], dout)), _rows(call, lse, delta))
        shares = _broadcast_view(dweights)
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
    tile = config.tile("weights", call.kind)
    num_tiles = triton.cdiv(call.seqlen_q, tile.block_m)
    triton_runtime.launch(
        _attention_refine_kernel,
        num_tiles * call.num_heads * call.batch,
        *(_view(q), _view(k), lse, peaks, weights),
        *(call.terms, call.sizes, call.scalars, num_tiles, call.config(tile)),
        warps=tile.warps,
        stages=tile.stages,
    )
    return Rows(peaks, weights, delta)


def _delta(call: Call, out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    batch, num_heads, seqlen_q, head_dim_v = out.shape
    delta = torch.empty((batch, num_heads, seqlen_q), dtype=torch.float32, device=out.device)
    rows = config.delta_rows(head_dim_v)
    triton_runtime.launch(
        _attention_delta_kernel,
        triton.cdiv(seqlen_q, rows) * num_heads * batch,
        *(_view(out), _view(dout), _view(dlse), delta, seqlen_q, num_heads),
        *(head_dim_v, config.padded_size(head_dim_v), rows),
        warps=4,
        stages=1,
    )
    return delta


def _add_weights_to_delta(call: Call, given: tuple[Any, ...], dweights: View) -> None:
    q, k, _, _, rows = given
    tile = config.tile("weights", call.kind)
    num_tiles = triton.cdiv(call.seqlen_q, tile.block_m)
    triton_runtime.launch(
        _attention_weights_delta_kernel,
        num_tiles * call.num_heads * call.batch,
        *(q, k, rows, dweights, call.terms, call.sizes, call.scalars, num_tiles),
        call.config(tile),
        warps=tile.warps,
        stages=tile.stages,
    )


def _keys_and_values(
    call: Call, given: tuple[Any, ...], dweights: View | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    if dk is None and dv is None:
        return
    tile = config.tile("dkdv", call.kind)
    num_tiles = triton.cdiv(call.seqlen_k, tile.block_n)
    triton_runtime.launch(
        _attention_backward_dkdv_kernel,
        num_tiles * call.num_heads_kv * call.batch,
        *(*given, _view(dk), _view(dv), dweights),
        *(call.terms, call.sizes, call.scalars, num_tiles, call.config(tile)),
        warps=tile.warps,
        stages=tile.stages,
    )


def _queries(call: Call, given: tuple[Any, ...], dweights: View | None, dq: Tensor | None) -> None:
    if dq is None:
        return
    tile = config.tile("dq", call.kind)
    num_tiles = triton.cdiv(call.seqlen_q, tile.block_m)
    triton_runtime.launch(
        _attention_backward_dq_kernel,
        num_tiles * call.num_heads * call.batch,
        *(*given, _view(dq), dweights),
        *(call.terms, call.sizes, call.scalars, num_tiles, call.config(tile)),
        warps=tile.warps,
        stages=tile.stages,
    )


def _bias(call: Call, given: tuple[Any, ...], dweights: View | None, dbias: Tensor) -> None:
    tile = config.tile("bias", call.kind)
    sizes = tuple(dbias.shape)
    whole = (call.batch, call.num_heads, call.seqlen_q, call.seqlen_k)
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
    triton_runtime.launch(
        _attention_bias_gradient_kernel,
        owners * splits,
        *(*given, dweights, partial, sizes, (*walks, splits)),
        *(call.terms, call.sizes, call.scalars),
        call.config(tile, SUM_ROWS=sizes[2] == 1, SUM_COLS=sizes[3] == 1),
        warps=tile.warps,
        stages=tile.stages,
    )
    if splits > 1:
        torch.sum(partial, 0, out=dbias)
