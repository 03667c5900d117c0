"""Tile sizes: a pure function of the problem.

`tests/test_triton_compile.py` compiles every line and holds it to no spilled register and to the
shared memory that the architecture has; `python -m fused_attn.triton_report` prints what comes out.
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


class Kind(NamedTuple):
    """What of a call decides the tiles."""

    head_dim: int  # the larger one
    itemsize: int
    arch: int
    pressure: int  # optional operands that every tile of scores has to load or draw
    shared_memory: int  # bytes that one program may use


# Lines by head size; in each, tiles for calls with none, one and several of the operands that make
# registers scarce (bias, mask, padding mask, dropout, softcap, gradient of the weights).
_Table = dict[int, tuple[tuple[int, int, int, int], ...]]

# 227 KiB of shared memory and wgmma.
_HOPPER: dict[str, _Table] = {
    "forward": {
        64: ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "dkdv": {
        64: ((64, 128, 8, 2), (32, 128, 8, 2), (16, 64, 8, 2)),
        128: ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        256: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "dq": {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        256: ((128, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
}

# 99 KiB, which GPUs of compute capability 8.6, 8.9 and 12.0 have; 8.0 and AMD's run it too.
_AMPERE: dict[str, _Table] = {
    "forward": {
        64: ((128, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2)),
        128: ((128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "dkdv": {
        64: ((64, 128, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
        128: ((32, 64, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
        256: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "dq": {
        64: ((128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        128: ((128, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
}

# Three products of TF32 stand for one of float32: each operand takes two registers.
_FLOAT32: dict[str, _Table] = {
    "forward": {
        64: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        128: ((32, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1),),
    },
    "dkdv": {
        64: ((16, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
    "dq": {
        64: ((32, 32, 4, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
    "bias": {64: ((16, 32, 8, 1),), 128: ((16, 16, 8, 1),), 256: ((16, 16, 8, 1),)},
    "weights": {64: ((32, 32, 4, 1),), 128: ((16, 16, 8, 1),), 256: ((16, 16, 8, 1),)},
}

# Kernels of optional results: one line a head size serves all.
_SHARED: dict[str, _Table] = {
    "bias": {64: ((32, 64, 8, 1),), 128: ((32, 64, 8, 1),), 256: ((16, 32, 4, 1),)},
    "weights": {64: ((64, 64, 8, 1),), 128: ((64, 64, 8, 1),), 256: ((64, 64, 8, 1),)},
}

# Small ones, so that short tests meet the edges of tiles; rows and columns of unequal size.
_INTERPRETED = {
    "forward": Tile(32, 64, 4, 1),
    "dkdv": Tile(64, 32, 4, 1),
    "dq": Tile(32, 64, 4, 1),
    "bias": Tile(32, 64, 4, 1),
    "weights": Tile(64, 64, 4, 1),
}

# Queries, of all heads of a group together, up to which keys are split among programs.
MAX_DECODE_ROWS = 32
MAX_SPLITS = 64

# Below this length a descriptor costs more to make than it saves.
DESCRIPTOR_SEQLEN = 512

# Programs that keep a GPU busy: about two on each multiprocessor.
ENOUGH_PROGRAMS = 256


def padded_size(head_dim: int) -> int:
    """Head size as the kernels see it: a power of two that the matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel: str, kind: Kind) -> Tile:
    """The tile of "forward", "dkdv", "dq", "bias" or "weights"."""
    if kind.arch == INTERPRETER:
        return _INTERPRETED[kernel]
    # The backward's Hopper tiles spill on Blackwell, which keeps accumulators elsewhere.
    hopper = 90 <= kind.arch < 120 and (kind.arch < 100 or kernel == "forward")
    table = _HOPPER if hopper else _AMPERE
    if kind.itemsize == 4:
        table = _FLOAT32
    elif kernel in _SHARED:
        table = _SHARED
    lines = table[kernel][max(64, padded_size(kind.head_dim))]
    best = Tile(*lines[min(kind.pressure, len(lines) - 1)])
    while best.stages > 1 and shared_bytes(kernel, best, kind) > kind.shared_memory:
        best = best._replace(stages=best.stages - 1)
    return best


def shared_bytes(kernel: str, tile: Tile, kind: Kind) -> int:
    """About how much shared memory a kernel takes: what stays, and what streams by in stages."""
    stays, streams = tile.block_m, 2 * tile.block_n
    if kernel == "dkdv":
        stays, streams = 2 * tile.block_n, 2 * tile.block_m
    elif kernel == "dq":
        stays = 2 * tile.block_m
    return (stays + tile.stages * streams) * padded_size(kind.head_dim) * kind.itemsize


def why_not(kind: Kind) -> list[str]:
    """Reasons why no tile fits; empty on every GPU that has at least 99 KiB of shared memory."""
    if kind.arch == INTERPRETER:
        return []
    wanted = max(shared_bytes(name, tile(name, kind), kind) for name in ("forward", "dkdv", "dq"))
    if wanted <= kind.shared_memory:
        return []
    return [
        f"needs {wanted} bytes of shared memory at head size {kind.head_dim}, "
        f"this device has {kind.shared_memory}"
    ]


def has_descriptors(arch: int, itemsize: int) -> bool:
    """Whether tiles are copied by tensor descriptors: data-centre GPUs from Hopper on, 16 bits."""
    return 90 <= arch < 120 and itemsize == 2


def decode_tile(rows: int, kind: Kind) -> Tile:
    """Tile of the decoding kernel for `rows` queries of all heads of a group."""
    block_m = max(16, 1 << (rows - 1).bit_length())
    wide = padded_size(kind.head_dim) > 128 or kind.itemsize == 4
    return Tile(block_m, 32 if wide else 64, 4, 2)


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
