"""Sentences out of a sequence-to-sequence model: greedy, sampled and beam search."""

from .beam import beam_search
from .search import Generated, Model, greedy_search, sample

__all__ = ["Generated", "Model", "beam_search", "greedy_search", "sample"]
