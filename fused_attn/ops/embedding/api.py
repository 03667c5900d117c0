"""The public function of the embedding; the package hands it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime import hints
from . import call
from .call import Scalars
from .problem import Operands


def embedding(
    tokens: Tensor,
    weight: Tensor,
    table: Tensor | None = None,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    offset: int = 0,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """What a Transformer's first layer reads, in one pass over memory.

    In plain PyTorch, with arithmetic in float32 (float64 for float64) and rounded once::

        y = F.embedding(tokens, weight, padding_idx) * scale
        y = y + table[offset : offset + tokens.shape[-1]]  # or F.embedding(positions, table)
        y = dropout(y, dropout_p)

    The backward adds the rows of a token in their order in the batch, so that repeated calls give
    bitwise equal gradients.

    Args:
        tokens: (*, L) int64 or int32, in [0, V); any strides.
        weight: (V, E) float32, float16, bfloat16 or float64; any strides.
        table: (P, E), one row a position; where its dtype differs, y has the promoted one.
        scale: factor of the token's row; √E in Vaswani et al. 2017, section 3.4.
        positions: (*, L) int64 or int32, in [0, P): the row of `table` for each token.
            Counted along the last dimension of `tokens` if None.
        offset: position of the first token where they are counted, as in cached generation.
        padding_idx: the row of `weight` that gets no gradient, as in `F.embedding`.
        dropout_p: probability in [0, 1] of dropping an element of y; the kept ones are divided by
            1 - dropout_p. Applied whenever it is not 0.
        dropout_rng: (2,) int64, seed and offset of the dropout. One pair gives the same mask on
            every backend. Drawn from torch's generator if None.
        backend: name of the backend that must run the call; chosen if None.

    Returns:
        y (*, L, E), new and contiguous.

    Raises:
        IndexError: a token or position is out of range, as torch raises on the CPU.
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    if unknown:
        hints.refuse_unknown("embedding", unknown, embedding.__annotations__)
    tokens, positions = (_as_int64(x) for x in (tokens, positions))
    operands = Operands(tokens, weight, table, positions, dropout_rng if dropout_p else None)
    return call.run(operands, Scalars(scale, offset, padding_idx, dropout_p, backend))


def _as_int64(indices: Any) -> Any:
    """What torch's embedding takes as well; anything else stays for the checks to refuse."""
    is_int32 = isinstance(indices, Tensor) and indices.dtype == torch.int32
    return indices.long() if is_int32 else indices
