"""The tiles that are shipped: pruned by what the compiler makes of them, at most four a case.

Each is compiled for every architecture of its table: no loop spills registers, and shared memory
suffices (`python -m benchmarks.compiler.triton_report --all`; a sample of it is a test).
Dictionaries go by kernel, then head size; there follow the lines for calls with none, one and
several of the operands that make registers scarce (bias, mask, padding mask, dropout, softcap,
gradient of the weights). Where bias, mask or gradient have to be loaded element by element, because
rows do not start at multiples of 16 elements, the next line is taken (by dkdv and dq for several
operands only): a fourth is for several operands and that. In a line the default comes first, the
others are for who asks for a trial.
"""

from __future__ import annotations

from typing import NamedTuple


class AttentionTile(NamedTuple):
    """Queries and keys of one tile, and how a program goes about it."""

    block_m: int
    block_n: int
    warps: int
    stages: int  # of the load pipeline
    chunk: int = 256  # columns of a row of Q, K, V or dO that are multiplied at once


Numbers = tuple[int, ...]
Table = dict[int, tuple[tuple[Numbers, ...], ...]]

# 227 KiB of shared memory and wgmma.
HOPPER: dict[str, Table] = {
    "forward": {
        64: (
            ((128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
            ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 3)),
            ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 2)),
            ((128, 32, 8, 2),),
        ),
        128: (
            ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)),
            ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2)),
            ((128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2)),
            ((64, 32, 8, 2),),
        ),
        256: (
            ((128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)),
            ((64, 32, 8, 2), (64, 32, 8, 3)),
            ((64, 32, 8, 2), (64, 32, 8, 3)),
            ((64, 16, 8, 2),),
        ),
    },
    "dkdv": {
        64: (
            ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 3), (64, 128, 8, 3)),
            ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 3)),
            ((16, 64, 8, 2),),
        ),
        128: (
            ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
            ((32, 64, 8, 2), (32, 64, 8, 3), (16, 64, 8, 2)),
            ((32, 32, 8, 1),),
        ),
        256: (
            ((32, 32, 8, 1), (32, 32, 8, 2)),
            ((16, 32, 8, 1), (16, 32, 8, 2), (16, 16, 8, 1)),
            ((16, 16, 8, 1),),
        ),
    },
    "dq": {
        64: (
            ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3)),
            ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2)),
            ((64, 32, 4, 2),),
            ((32, 32, 4, 2),),
        ),
        128: (
            ((128, 64, 8, 2), (128, 32, 8, 3), (128, 64, 8, 1)),
            ((128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
            ((64, 32, 8, 2),),
            ((32, 32, 8, 1),),
        ),
        256: (
            ((128, 32, 8, 2), (64, 32, 8, 2)),
            ((32, 32, 8, 1), (32, 32, 8, 2)),
            ((32, 32, 8, 1),),
        ),
    },
}

# 99 KiB, which GPUs of compute capability 8.6, 8.9 and 12.0 have; 8.0 and AMD's run it too.
AMPERE: dict[str, Table] = {
    "forward": {
        64: (
            ((128, 64, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3)),
            ((64, 32, 4, 2), (128, 32, 8, 2)),
            ((64, 32, 4, 2),),
        ),
        128: (
            ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
            ((64, 32, 8, 2), (64, 32, 4, 2)),
            ((64, 32, 8, 2),),
        ),
        256: (((64, 32, 8, 2),), ((64, 32, 8, 2),), ((64, 32, 8, 2),)),
    },
    "dkdv": {
        64: (
            ((64, 128, 8, 2), (64, 64, 4, 2)),
            ((32, 64, 8, 2), (16, 64, 8, 2)),
            ((16, 32, 8, 2),),
        ),
        128: (((32, 64, 8, 2),), ((16, 32, 8, 1),), ((16, 16, 8, 1),)),
        256: (((32, 32, 8, 1),), ((16, 32, 8, 1),), ((16, 16, 8, 1),)),
    },
    "dq": {
        64: (
            ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
            ((64, 32, 4, 2),),
            ((32, 32, 4, 2),),
        ),
        128: (
            ((128, 32, 8, 2), (64, 32, 8, 2)),
            ((64, 32, 8, 1),),
            ((32, 32, 8, 1),),
            ((32, 16, 8, 1),),
        ),
        256: (
            ((64, 32, 8, 1),),
            ((32, 32, 8, 1), (32, 16, 8, 1)),
            ((32, 16, 8, 1),),
        ),
    },
}

# The backward's Hopper tiles spill here, where accumulators are kept elsewhere.
BLACKWELL: dict[str, Table] = {
    **AMPERE,
    "forward": {
        **HOPPER["forward"],
        128: (
            ((128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
            *HOPPER["forward"][128][1:],
        ),
        256: (
            HOPPER["forward"][256][0],
            ((64, 32, 8, 3),),
            HOPPER["forward"][256][2],
        ),
    },
}

# Three products of TF32 stand for one of float32: each operand takes two registers, and rows of 128
# and more are multiplied in chunks that are loaded again.
FLOAT32: dict[str, Table] = {
    "forward": {
        64: (((64, 32, 8, 2),), ((32, 32, 8, 1),), ((32, 32, 8, 1),)),
        128: (
            ((32, 32, 8, 1, 32),),
            ((32, 32, 8, 1, 32), (16, 32, 8, 1)),
            ((32, 32, 8, 1, 32), (16, 16, 8, 1, 64)),
        ),
        256: (
            ((32, 32, 8, 1, 32),),
            ((32, 32, 8, 1, 32), (16, 16, 8, 1, 32)),
            ((32, 16, 8, 1, 32), (16, 16, 8, 1, 64)),
        ),
    },
    "dkdv": {
        64: (((16, 32, 8, 2),), ((16, 32, 8, 1),), ((16, 16, 8, 1),)),
        128: (
            ((32, 32, 8, 1, 32), (16, 16, 8, 1)),
            ((32, 32, 8, 1, 32), (16, 32, 8, 1, 32)),
            ((16, 16, 8, 1, 16),),
        ),
        256: (
            ((16, 32, 8, 1, 16), (16, 16, 8, 1, 32)),
            ((16, 32, 8, 1, 16), (16, 16, 8, 1, 32)),
            ((16, 16, 8, 1, 16),),
        ),
    },
    "dq": {
        64: (((32, 32, 8, 1),), ((32, 32, 8, 1),), ((32, 16, 8, 1),)),
        128: (
            ((32, 32, 8, 1, 32), (16, 16, 8, 1)),
            ((32, 32, 8, 1, 32),),
            ((32, 16, 8, 1, 32), (16, 16, 8, 1, 32)),
        ),
        256: (
            ((32, 32, 8, 1, 32), (32, 16, 8, 1, 32)),
            ((32, 32, 8, 1, 32), (32, 16, 8, 1, 32), (16, 16, 8, 1, 32)),
            ((16, 32, 8, 1, 32), (32, 16, 8, 1, 32), (16, 16, 8, 1, 32)),
        ),
    },
    "bias": {
        64: (((16, 32, 8, 1),),),
        128: (((16, 16, 4, 1, 16),),),
        256: (((16, 16, 4, 1, 16),),),
    },
    "weights": {
        64: (((32, 32, 4, 1),), ((32, 32, 4, 1),), ((32, 16, 4, 1),)),
        128: (((16, 16, 4, 1, 32),),),
        256: (((16, 16, 4, 1, 32),),),
    },
    "statistics": {
        64: (((32, 16, 4, 1),),),
        128: (((16, 16, 4, 1),),),
        256: (((16, 16, 4, 1),),),
    },
}

# Kernels of optional results, for all architectures.
SHARED: dict[str, Table] = {
    "bias": {
        64: (((32, 64, 8, 1),),),
        128: (((32, 32, 4, 1),), ((32, 32, 4, 1),), ((32, 64, 8, 1),)),
        256: (((16, 32, 4, 1),),),
    },
    "weights": {
        64: (((64, 64, 8, 1),), ((64, 64, 8, 1),), ((64, 32, 8, 1),)),
        128: (((64, 32, 4, 1),), ((64, 32, 4, 1),), ((64, 32, 4, 1),), ((32, 32, 4, 1),)),
        256: (((64, 64, 8, 1),), ((64, 64, 8, 1),), ((64, 64, 8, 1),), ((32, 32, 8, 1),)),
    },
    "statistics": {  # without a bias, which may need more of them: it reads out and its gradient
        64: (((64, 16, 4, 1),),),
        128: (((16, 16, 4, 1),),),
        256: (((16, 16, 4, 1),),),
    },
}

# Keys, warps and stages of decoding, by bytes of an element and head size: its rows are few.
DECODE: dict[int, dict[int, tuple[Numbers, ...]]] = {
    2: {
        64: ((64, 4, 2), (128, 4, 2), (64, 4, 3)),
        128: ((64, 4, 2), (64, 4, 3), (32, 4, 3)),
        256: ((32, 4, 2), (32, 4, 3)),
    },
    4: {
        64: ((32, 4, 2), (64, 4, 2)),
        128: ((32, 4, 1, 32), (16, 4, 1, 32)),
        256: ((16, 4, 1, 32),),
    },
}

# Small ones, so that short tests meet the edges of tiles; rows and columns of unequal size.
INTERPRETED: dict[str, tuple[AttentionTile, ...]] = {
    "forward": (
        AttentionTile(32, 64, 4, 1, 16),
        AttentionTile(64, 32, 4, 1, 32),
        AttentionTile(16, 16, 4, 1),
    ),
    "dkdv": (AttentionTile(64, 32, 4, 1, 16), AttentionTile(16, 64, 4, 1)),
    "dq": (AttentionTile(32, 64, 4, 1, 16), AttentionTile(64, 16, 4, 1)),
    "bias": (AttentionTile(32, 64, 4, 1, 16),),
    "weights": (AttentionTile(64, 64, 4, 1, 16),),
    "statistics": (AttentionTile(64, 32, 4, 1, 16),),
}

COMBINE = AttentionTile(16, 16, 4, 1)  # of what `decode.py` adds up; only warps and stages count
