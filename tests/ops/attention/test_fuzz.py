"""Random calls against the oracle.

A failure prints the one line that repeats it: `python tests/test_attention_fuzz.py cpu 17`, that
is backend and seed. `--fuzz N` runs N seeds a backend instead of 200.
"""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import replace

import torch

from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain, skip_unless_supported

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 260)
HEAD_DIMS = (1, 3, 8, 16, 20, 32, 33, 64, 80)


def random_case(seed: int) -> tuple[Case, torch.dtype]:
    draw = random.Random(seed)

    def maybe(probability: float, *choices: object) -> object:
        return draw.choice(choices) if draw.random() < probability else None

    num_heads_kv = draw.choice((1, 2, 3))
    head_dim = draw.choice(HEAD_DIMS)
    seqlen_q = draw.choice(LENGTHS)
    broadcast = [a + b + c + d for a in "b1" for b in "h1" for c in "q1" for d in "k1"]
    case = Case(
        batch=draw.choice((0, 1, 2, 3)) if draw.random() < 0.3 else 2,
        num_heads=num_heads_kv * draw.choice((1, 1, 2)),
        num_heads_kv=num_heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if draw.random() < 0.4 else draw.choice(LENGTHS),
        head_dim=head_dim,
        head_dim_v=maybe(0.3, *HEAD_DIMS),
        causal=draw.choice((False, False, True, "lower_right")),
        window=maybe(0.2, (5, 5), (40, 0), (-1, 3), (0, -1), (100, 20)),
        padding=maybe(0.4, "mask", "lengths", "holes", "empty"),
        mask=maybe(0.25, *broadcast),
        bias=maybe(0.3, *broadcast),
        alibi=draw.random() < 0.2,
        softcap=maybe(0.2, 1.0, 20.0),
        scale=maybe(0.2, 0.3, -0.2, 0.0),
        dropout_p=draw.choice((0.0, 0.0, 0.0, 0.2, 0.7)),
        layout=draw.choice(("bhld", "bhld", "blhd", "expanded", "strided")),
        weights=maybe(0.3, "average", "per_head"),
        seed=seed,
    )
    if case.layout == "expanded" and case.batch == 0:
        case = replace(case, layout="bhld")
    if case.mask is not None:
        case = replace(case, mask_tile=random.Random(-1 - seed).choice((None, 16, 64)))
    dtype = draw.choice(DTYPES)
    more = random.Random(-100001 - seed)  # of their own: the cases above stay what they were
    if more.random() < 0.3:
        banded = case.causal or case.window is not None
        case = replace(
            case,
            documents=more.choice((None, "runs", "mixed")),
            prefix=banded and more.random() < 0.5,
            chunk=more.choice((None, None, 1, 16, 50)),
        )
    return case, dtype


def check(backend: str, seed: int) -> None:
    case, dtype = random_case(seed)
    tensors = case.tensors(dtype)
    skip_unless_supported(case, backend, tensors)
    try:
        check_against_oracle(
            functools.partial(run_backend, case, backend),
            functools.partial(run_plain, case),
            tensors,
            ("out", "lse", "weights"),
            attention_noise,
        )
    except Exception as error:
        repeat = f"repeat: python -m tests.ops.attention.test_fuzz {backend} {seed}"
        raise AssertionError(f"{error}\n{repeat}\n{case} {dtype}") from error


def test_random_calls_agree_with_the_oracle(attention_backend: str, fuzz_seed: int) -> None:
    check(attention_backend, fuzz_seed)


if __name__ == "__main__":
    check(sys.argv[1], int(sys.argv[2]))
