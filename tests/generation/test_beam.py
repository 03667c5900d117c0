"""Beam search with one beam, where the end is likely but not likeliest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_attn import beam_search, greedy_search
from tests.generation.test_generation import ENDS, EOS, ends_early, log_probability


@pytest.mark.usefixtures("one_thread")
def test_no_sentence_ends_where_other_words_are_likelier() -> None:
    """An end that is not among the best is no way to go on, though all that do turn out worse."""
    src, lengths, others = torch.tensor([[3, 4, 3]]), set(), 0
    for seed in range(24):
        model = ends_early(seed)
        for use_cache in (True, False):
            options: dict[str, Any] = {**ENDS, "max_len": 8, "use_cache": use_cache}
            greedy = greedy_search(model, src, **options)
            beam = beam_search(model, src, beams=1, length_penalty=0.0, **options)
            assert torch.equal(greedy.tokens, beam.tokens)
            torch.testing.assert_close(greedy.scores, beam.scores)
        # The end at once would have been the better sentence, at another place than the first.
        at_once = log_probability(model, src, (EOS,))
        others += int(at_once > float(greedy.scores[0]) and int(greedy.tokens[0, 0]) != EOS)
        lengths.add(greedy.tokens.shape[1])
    assert others > 0
    assert len(lengths) > 1
