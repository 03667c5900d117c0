"""Tile sizes: a pure function of the problem.

Every line was compiled for all architectures it serves; `tests/test_triton_compile.py` holds it to
no spilled register and to the shared memory that the architecture has.
"""

from __future__ import annotations

from typing import NamedTuple

from ...triton_runtime import INTERPRETER


class Tile(NamedTuple):
    """Queries and keys of one tile, warps of a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def padded_size(head_dim: int) -> int:
    """Head size as the kernels see it: a power of two that the matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


# Queries, of all heads of a group together, up to which keys are split among programs.
MAX_DECODE_ROWS = 32
MAX_SPLITS = 64

# Below this length a descriptor costs more to make than it saves.
DESCRIPTOR_SEQLEN = 512


def has_descriptors(arch: int) -> bool:
    """Whether tiles are copied by tensor descriptors: data-centre GPUs from Hopper on."""
    return 90 <= arch < 120


def forward_tile(head_dim: int, itemsize: int, arch: int) -> Tile:
    if arch == INTERPRETER:
        return Tile(32, 64, 4, 2)
    return Tile(64, 64, 4, 2)


def dkdv_tile(head_dim: int, itemsize: int, arch: int) -> Tile:
    return Tile(32, 32, 4, 2)


def dq_tile(head_dim: int, itemsize: int, arch: int) -> Tile:
    return Tile(32, 32, 4, 2)


def bias_tile(head_dim: int, itemsize: int, arch: int) -> Tile:
    return Tile(32, 32, 4, 2)


def weights_tile(head_dim: int, itemsize: int, arch: int) -> Tile:
    return Tile(32, 32, 4, 2)


def decode_tile(rows: int, head_dim: int, itemsize: int, arch: int) -> Tile:
    block_m = max(16, 1 << (rows - 1).bit_length())
    return Tile(block_m, 32 if padded_size(head_dim) > 128 or itemsize == 4 else 64, 4, 2)


def decode_splits(rows: int, seqlen_k: int, planes: int, multiprocessors: int) -> int:
    """Splits of the keys where `planes` key heads have `rows` queries each; 1 for no decoding.

    Enough for two programs on each multiprocessor, but none shorter than 256 keys.
    """
    if rows > MAX_DECODE_ROWS or planes == 0:
        return 1
    wanted = -(-2 * multiprocessors // planes)
    return max(1, min(wanted, seqlen_k // 256, MAX_SPLITS))


def delta_rows(head_dim: int) -> int:
    """Rows of a program of the delta kernel: about 4096 elements."""
    return 4096 // padded_size(head_dim)


# Programs that keep a GPU busy: about two on each multiprocessor.
ENOUGH_PROGRAMS = 256
