"""Batches of sentences of like length, each of about as many tokens as the others."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from corpus import Pairs
from torch import Tensor
from vocabulary import BOS, EOS, PAD, Vocabulary


class Batch(NamedTuple):
    """Token numbers, padded: src (N, S) ending with EOS, tgt (N, L) from BOS to EOS."""

    src: Tensor
    tgt: Tensor

    def to(self, device: str) -> Batch:
        """The same on `device`."""
        return Batch(self.src.to(device), self.tgt.to(device))

    @property
    def target_tokens(self) -> int:
        """Tokens that are to be predicted."""
        return int((self.tgt[:, 1:] != PAD).sum())


class Dataset:
    """The encoded pairs that are short enough.

    Attributes:
        too_long: how many were not.
    """

    def __init__(self, pairs: Pairs, vocabulary: Vocabulary, max_tokens: int) -> None:
        sources, targets = (vocabulary.encode(side) for side in (pairs.sources, pairs.targets))
        both = list(zip(sources, targets, strict=True))
        # One more for EOS, and for the target's BOS or EOS.
        self.rows = [pair for pair in both if max(map(len, pair)) < max_tokens]
        self.too_long = len(both) - len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, max_tokens: int, seed: int | None = None) -> list[list[int]]:
        """Rows of each batch; no more than `max_tokens` places a side, padding included.

        Args:
            seed: of the order of the batches, and of the rows of equal length; None: by length.
        """
        order = list(range(len(self.rows)))
        shuffle = random.Random(seed).shuffle
        if seed is not None:
            shuffle(order)
        order.sort(key=lambda i: (len(self.rows[i][1]), len(self.rows[i][0])))
        found: list[list[int]] = []
        longest = 0
        for i in order:
            size = max(map(len, self.rows[i])) + 1
            longest = max(longest, size)
            if not found or (len(found[-1]) + 1) * longest > max_tokens:
                found.append([])
                longest = size
            found[-1].append(i)
        if seed is not None:
            shuffle(found)
        return found

    def batch(self, indices: list[int]) -> Batch:
        """The rows `indices` as tensors."""
        return Batch(
            pad([[*self.rows[i][0], EOS] for i in indices]),
            pad([[BOS, *self.rows[i][1], EOS] for i in indices]),
        )


def pad(rows: list[list[int]]) -> Tensor:
    """(N, longest) int64, filled up with PAD."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], dtype=torch.int64)
