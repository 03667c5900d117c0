"""Philox 4x32-10 in plain torch: the dropout bits that every kernel reproduces.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
32-bit words live in int64 tensors, since torch has no unsigned arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, subclasses

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def draw_rng(device: torch.device) -> Tensor:
    """(seed, offset) of one dropout call, (2,) int64, from torch's generator of `device`.

    A tensor rather than two numbers: nothing is copied to the host, and a captured CUDA graph
    draws anew at each replay.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def rng_of_call(given: Any, dropout_p: Any, tensor: Any, name: str) -> Any:
    """The (seed, offset) of a call that wants dropout: what was given, dense; else newly drawn.

    Args:
        tensor: an operand of the call, called `name`; the draw is on its device.

    Raises:
        TypeError, ValueError: nothing can be drawn. What was given is not checked.
    """
    if given is not None:
        return given.contiguous() if isinstance(given, Tensor) else given
    checks.expect_tensor(name, tensor)
    checks.expect_probability("dropout_p", dropout_p)
    return subclasses.replicated_like(draw_rng(tensor.device), tensor)


def threshold(dropout_p: float) -> int:
    """A word is kept iff it is at least this."""
    return int(dropout_p * 2.0**32)


def kept_in_rows(rng: Tensor, dropout_p: float, rows: int, width: int) -> Tensor:
    """Which elements of `rows` rows of `width` survive a dropout: (rows, width) bool.

    A function of seed, offset, row and column alone: column j of row i draws word j mod 4 of the
    counter (j div 4, low word of i, high word of i, low word of the offset).
    """
    row = torch.arange(rows, device=rng.device)[:, None]
    quad = torch.arange((width + 3) // 4, device=rng.device)
    counter = (quad, row & _WORD, row >> 32, rng[1] & _WORD)
    drawn = words(counter, rng[0]).flatten(-2)[:, :width]
    return drawn >= threshold(dropout_p)


def words(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> Tensor:
    """The four 32-bit words of `counter` under the 64-bit key `seed`.

    Args:
        counter: four int64 tensors of 32-bit words, broadcast against each other.
        seed: 0-d int64.

    Returns:
        int64 in [0, 2**32), shape of the broadcast counter plus a last dimension of 4.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, by halves so that int64 does not overflow."""
    low_part = word * (multiplier & 0xFFFF)  # < 2**48
    high_part = word * (multiplier >> 16)  # < 2**48
    middle = (low_part >> 16) + high_part
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)
