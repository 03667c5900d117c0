"""Sentences out of a model: greedy, sampled and beam search."""

from .beam import beam_search
from .decoder_only import DecoderOnly
from .search import Generated, Model, greedy_search, sample
from .seq2seq import Seq2SeqTransformer

__all__ = [
    "DecoderOnly",
    "Generated",
    "Model",
    "Seq2SeqTransformer",
    "beam_search",
    "greedy_search",
    "sample",
]
