"""Decoding over so many keys that threads share them: the parts are merged rightly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_attn import attention
from fused_attn.runtime import native
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain

THREADS = 3
LONG = 8192
pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def case(**facts: Any) -> Case:
    usual: dict[str, Any] = {
        "batch": 1, "num_heads": 2, "num_heads_kv": 2, "seqlen_q": 1, "seqlen_k": LONG,
        "head_dim": 64,
    }  # fmt: skip
    return Case(**{**usual, **facts})


CASES = {
    "plain": case(),
    "one head": case(num_heads=1, num_heads_kv=1),
    "grouped": case(num_heads=6),
    "more heads than a pass takes": case(num_heads=40, num_heads_kv=1, head_dim=32),
    "few queries": case(seqlen_q=5, causal="lower_right"),
    "uneven": case(seqlen_k=LONG + 333),
    "keys hidden at the end": case(batch=2, padding="lengths"),
    "keys hidden at the front": case(window=(3000, 0), causal="lower_right"),
    "keys hidden in between": case(mask="bhqk"),
    "bias": case(bias="bhqk"),
    "alibi": case(alibi=True),
    "dropout": case(dropout_p=0.3),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parts_of_the_keys_are_merged(name: str, dtype: torch.dtype) -> None:
    given = CASES[name]
    tensors = given.tensors(dtype)
    check_against_oracle(
        functools.partial(run_backend, given, "cpu"),
        functools.partial(run_plain, given),
        {key: x.detach() for key, x in tensors.items()},
        ("out", "lse", "weights"),
        attention_noise,
    )
    run_backend(given, "cpu", **{key: x.detach() for key, x in tensors.items()})
    assert native.module().attention_last_decode_parts() > 1


@pytest.mark.parametrize("where", [0, LONG // 2 + 7, LONG - 1])
@pytest.mark.parametrize("height", [30.0, 1e5])
def test_the_largest_score_may_stand_in_any_part(where: int, height: float) -> None:
    """Its value is the answer, and every other part adds what is below rounding."""
    q = torch.ones(1, 2, 1, 64)
    k = torch.zeros(1, 2, LONG, 64)
    k[:, :, where] = height / 8
    v = torch.randn(1, 2, LONG, 64)
    found, lse = attention(q, k, v, backend="cpu", return_lse=True)
    assert native.module().attention_last_decode_parts() > 1
    torch.testing.assert_close(found[0, :, 0], v[0, :, where], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, height), rtol=1e-6, atol=1e-5)
