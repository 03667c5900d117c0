"""Sentences out of a sequence-to-sequence model: greedy, sampled and beam search."""

from .beam import beam_search
from .search import Generated, Model, greedy_search, sample
from .seq2seq import Seq2SeqTransformer

__all__ = ["Generated", "Model", "Seq2SeqTransformer", "beam_search", "greedy_search", "sample"]
