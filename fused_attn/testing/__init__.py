"""Tests for one's own CI: parity of models and calls, random calls, and the error budget of both.

`assert_parity` and `assert_matches_reference` are for tests, `python -m fused_attn.testing fuzz`
tries random calls, and `pytest -p fused_attn.testing.plugin` brings fixtures and random calls into
one's own run.
"""

from .budget import (
    BACKWARD_FACTOR,
    DRAWS,
    FORWARD_FACTOR,
    assert_within_budget,
    attention_noise,
    check_against_oracle,
    gradients,
    largest_error,
    neighbours,
    output_gradients,
    plain_error,
    pull_back,
    rounding_step,
    to_dtype,
)
from .parity import assert_matches_reference, assert_parity

__all__ = [
    "BACKWARD_FACTOR",
    "DRAWS",
    "FORWARD_FACTOR",
    "assert_matches_reference",
    "assert_parity",
    "assert_within_budget",
    "attention_noise",
    "check_against_oracle",
    "gradients",
    "largest_error",
    "neighbours",
    "output_gradients",
    "plain_error",
    "pull_back",
    "rounding_step",
    "to_dtype",
]
