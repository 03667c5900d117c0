"""What the code of functions calls, beside what Triton has (`function_source.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import tanh

__all__ = ["tanh"]


@triton.jit
def floor_div(a, b):
    """floor(a / b) of whole numbers."""
    rest = a % b
    return a // b - ((rest != 0) & ((rest < 0) != (b < 0))).to(tl.int32)


@triton.jit
def remainder(a, b):
    """A - b * floor(a / b) of whole numbers."""
    rest = a % b
    return rest + tl.where((rest != 0) & ((rest < 0) != (b < 0)), b, 0)


@triton.jit
def sign(x):
    """-1, 0 or 1 as x has it; 0 of NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def trunc(x):
    """X without what is behind the point."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def log1p(x):
    """log(1 + x), right where x is small: Kahan's correction of what 1 + x loses."""
    u = 1.0 + x
    lost = tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, lost))


@triton.jit
def expm1(x):
    """exp(x) - 1, right where x is small."""
    u = tl.exp(x)
    log = tl.log(u)
    near = (u - 1.0) * (x / tl.where(log == 0.0, 1.0, log))
    return tl.where(u == 1.0, x, tl.where(tl.abs(x) < 0.5, near, u - 1.0))


@triton.jit
def power(x, exponent):
    """x**exponent of x >= 0; NaN below."""
    return tl.exp2(exponent * tl.log2(x))


@triton.jit
def power_of_either_sign(x, exponent, ODD: tl.constexpr):
    """x**exponent of a whole exponent, ODD or not."""
    size = tl.exp2(exponent * tl.log2(tl.abs(x)))
    if ODD:
        size = tl.where(x < 0, -size, size)
    return size


@triton.jit
def take(pointers, inside, INSIDE: tl.constexpr):
    """Load a tile; 0 for keys that do not exist. INSIDE: all do."""
    if INSIDE:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.broadcast_to(inside, pointers.shape), other=0)


@triton.jit
def kind_of(kinds, m0, n0, row, col, sequence, head, UNIFORM: tl.constexpr):
    """What the list of blocks says of each pair; UNIFORM: a tile lies in one block."""
    block_q, block_k = kinds.block[0] >> 8, kinds.block[1] >> 8
    pointers = kinds.ptr + sequence.batch.to(tl.int64) * (kinds.strides[0] >> 8)
    pointers += head.to(tl.int64) * (kinds.strides[1] >> 8)
    stride = kinds.strides[2] >> 8
    if UNIFORM:
        place = (m0 // block_q) * stride + n0 // block_k
    else:
        place = (row // block_q) * stride + tl.minimum(col, sequence.len_k - 1) // block_k
    return tl.load(pointers + place)
