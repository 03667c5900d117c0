"""Tile sizes: a pure function of the problem, unless somebody asks for a trial (`tuning.py`)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ....runtime.triton.device import AMD, INTERPRETER
from . import tiles
from .tiles import AttentionTile


class ProblemClass(NamedTuple):
    """What of a call decides the tiles."""

    head_dim: int  # the larger one
    itemsize: int
    arch: int
    pressure: int  # optional operands that every tile of scores has to load or draw
    shared_memory: int  # bytes that one program may use
    ragged: bool = False  # some of them have to be loaded element by element

    def name(self, band: bool) -> str:
        """The class of problems that share a line of the table, for people and for files."""
        size = max(64, padded_size(self.head_dim))
        pressure = ("plain", "one operand", "several operands")[min(self.pressure, 2)]
        ragged = ", ragged" * self.ragged
        return f"head {size}, {self.itemsize} bytes, {pressure}{ragged}{', band' * band}"


# Queries, of all heads of a group together, up to which keys are split among programs.
MAX_DECODE_ROWS = 32
MAX_SPLITS = 64

# Below this length a descriptor costs more to make than it saves.
DESCRIPTOR_SEQLEN = 512

# Every NVIDIA GPU from compute capability 8.0 on has it, and all tables but Hopper's keep to it.
ENOUGH_SHARED_MEMORY = 99 << 10

# Programs that keep a GPU busy: about two on each multiprocessor.
ENOUGH_PROGRAMS = 256


def padded_size(head_dim: int) -> int:
    """Head size as the kernels see it: a power of two that the matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


# 16-bit operations in the time that memory takes for a byte, about, from A100 to B200.
OPERATIONS_PER_BYTE = 150
# Below this many operations a call is over before two more kernels are launched.
LISTED_OPERATIONS = 1 << 32


def lists_pay(problem: ProblemClass, mask_elements: int, scores: int, products: float) -> bool:
    """Whether to read a mask beforehand, so that tiles that it hides are not visited.

    It does where reading it once costs at most a quarter of the call's matrix products, which is
    what a mask costs that hides no tile: where several heads share it, in the backward, and in
    decoding.

    Args:
        mask_elements: what it holds, without what it is broadcast over.
        scores: elements of the scores of the call.
        products: matrix products that the kernels make of them.
    """
    if problem.arch == INTERPRETER:  # tests meet both
        return 2 * mask_elements <= scores
    operations = 2 * products * padded_size(problem.head_dim) * scores
    if operations < LISTED_OPERATIONS:
        return False
    return 4 * mask_elements * OPERATIONS_PER_BYTE <= operations


def classes_pay(problem: ProblemClass, scores: int, products: float) -> bool:
    """Whether to look beforehand which tiles a function shows wholly, in part or not at all.

    That costs about the mask code of one kernel, once for all calls of a mask. The answer has to be
    the same for the first of them and the others, so that results repeat bit for bit.
    """
    if problem.arch == INTERPRETER:
        return True
    return 2 * products * padded_size(problem.head_dim) * scores >= LISTED_OPERATIONS


def decode_products(problem: ProblemClass, rows: int) -> float:
    """Products of each score that take the time in which decoding reads keys and values."""
    return OPERATIONS_PER_BYTE * problem.itemsize / rows


@functools.cache
def candidates(kernel: str, problem: ProblemClass) -> tuple[AttentionTile, ...]:
    """Tiles of "forward", "dkdv", "dq", "bias" or "weights" that fit; the first is the default."""
    if problem.arch == INTERPRETER:
        return tiles.INTERPRETED[kernel]
    table, limit = _table(kernel, problem)
    lines = table[kernel][max(64, padded_size(problem.head_dim))]
    # One operand that comes element by element is too much for the forward's larger tiles alone.
    scarcer = problem.ragged and (problem.pressure > 1 or kernel not in ("dkdv", "dq"))
    line = lines[min(min(problem.pressure, 2) + scarcer, len(lines) - 1)]
    return _fitting(kernel, [AttentionTile(*numbers) for numbers in line], problem, limit)


def _table(kernel: str, problem: ProblemClass) -> tuple[dict[str, tiles.Table], int]:
    """Where a kernel's tiles are found, and the shared memory that they keep to."""
    if problem.itemsize == 4:
        return tiles.FLOAT32, ENOUGH_SHARED_MEMORY
    if kernel in tiles.SHARED:
        return tiles.SHARED, ENOUGH_SHARED_MEMORY
    if 90 <= problem.arch < 120:
        table = tiles.HOPPER if problem.arch < 100 else tiles.BLACKWELL
        return table, 227 << 10
    return tiles.AMPERE, ENOUGH_SHARED_MEMORY


def _fitting(
    kernel: str, known: list[AttentionTile], problem: ProblemClass, limit: int
) -> tuple[AttentionTile, ...]:
    """Those that fit in shared memory, with fewer stages where it takes that; else the first.

    Args:
        limit: with so much of it the compiler has been seen to fit them all.
    """
    if problem.shared_memory >= limit:
        return tuple(known)
    fit = []
    for tile in known:
        while tile.stages > 1 and shared_bytes(kernel, tile, problem) > problem.shared_memory:
            tile = tile._replace(stages=tile.stages - 1)
        if shared_bytes(kernel, tile, problem) <= problem.shared_memory:
            fit.append(tile)
    return tuple(dict.fromkeys(fit)) or (tile,)


def tile(kernel: str, problem: ProblemClass) -> AttentionTile:
    """The default, a pure function of the problem."""
    return candidates(kernel, problem)[0]


def shared_bytes(kernel: str, tile: AttentionTile, problem: ProblemClass) -> int:
    """Shared memory that a kernel takes at most, about; the exact number only its compiler knows.

    What stays, what streams by in stages, the operands of a tile of scores, and a quarter for what
    the compiler moves through it to change layouts. For AMD the compiler keeps the first of the
    stages and what stays in registers.
    """
    size = padded_size(problem.head_dim)
    own, other = tile.block_m, tile.block_n
    if kernel == "dkdv":
        own, other = other, own
    if problem.arch == AMD:
        return 4 * max(tile.stages - 1, 1) * other * min(size, 2 * tile.chunk) * problem.itemsize
    stays = 2 * own if kernel in ("dkdv", "dq") else own
    tensors = (stays + tile.stages * 2 * other) * size * problem.itemsize
    if size > tile.chunk:  # chunks of both sides, and tiles of one whole
        tensors = ((own + other) * tile.chunk + 2 * other * size) * problem.itemsize
    operands = tile.stages * own * other * 2 * min(problem.pressure, 2)
    return (tensors + operands) * 5 // 4


def why_not(problem: ProblemClass, kernels: tuple[str, ...], decode_rows: int = 0) -> list[str]:
    """Reasons why one of `kernels` does not fit on this device.

    Args:
        kernels: "forward", "dkdv", "dq", "bias", "weights" or "decode".
        decode_rows: queries that share a tile in decoding.
    """
    reasons: list[str] = []
    for kernel in kernels if problem.arch != INTERPRETER else ():
        if kernel == "decode":
            best, limit = decode_candidates(decode_rows, problem)[0], ENOUGH_SHARED_MEMORY
        else:
            best, limit = tile(kernel, problem), _table(kernel, problem)[1]
        wanted = shared_bytes(kernel, best, problem)
        if problem.shared_memory < min(wanted, limit):
            reasons.append(
                f"the {kernel} kernel needs {wanted} bytes of shared memory at head size "
                f"{problem.head_dim}, this device has {problem.shared_memory}"
            )
    return reasons


def has_descriptors(arch: int, itemsize: int) -> bool:
    """Whether tiles are copied by tensor descriptors: data-centre GPUs from Hopper on, 16 bits."""
    return 90 <= arch < 120 and itemsize == 2


@functools.cache
def decode_candidates(rows: int, problem: ProblemClass) -> tuple[AttentionTile, ...]:
    """Tiles of the decoding kernel for `rows` queries of all heads of a group, default first."""
    block_m = max(16, 1 << (rows - 1).bit_length())
    lines = tiles.DECODE[problem.itemsize][max(64, padded_size(problem.head_dim))]
    known = [AttentionTile(block_m, *line) for line in lines]
    if problem.arch == INTERPRETER:
        return (known[0],)
    return _fitting("decode", known, problem, ENOUGH_SHARED_MEMORY)


def decode_splits(rows: int, seqlen_k: int, planes: int, multiprocessors: int) -> int:
    """Splits of the keys where `planes` key heads have `rows` queries each; 1 for no decoding.

    Enough for two programs on each multiprocessor, but none shorter than 256 keys.
    """
    if rows > MAX_DECODE_ROWS or planes == 0:
        return 1
    wanted = -(-2 * multiprocessors // planes)
    return max(1, min(wanted, seqlen_k // 256, MAX_SPLITS))
