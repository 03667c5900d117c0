"""Every backend against the float64 oracle: outputs, lse, weights and gradients, all operands.

Sizes stand below, at and above the kernels' tiles (16 lanes, 64 queries, 128 keys), odd, and one.
"""

from __future__ import annotations

import functools

import pytest
import torch

from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain, skip_unless_supported

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SIZES = {
    "one": Case(1, 1, 1, 1, 1, 1),
    "one query": Case(seqlen_q=1, seqlen_k=129),
    "one key": Case(seqlen_q=65, seqlen_k=1),
    "below lanes": Case(seqlen_q=15, seqlen_k=17),
    "below tile": Case(seqlen_q=63, seqlen_k=127, head_dim=64),
    "tile": Case(seqlen_q=64, seqlen_k=128, head_dim=64),
    "above tile": Case(seqlen_q=65, seqlen_k=129, head_dim=64),
    "several tiles": Case(1, 1, 1, 200, 600, 32),
    "odd head": Case(head_dim=13, head_dim_v=13),
    "wide head": Case(1, 1, 1, 20, 33, 130),
    "deep head": Case(1, 1, 1, 20, 40, 256),
    "head sizes differ": Case(head_dim=24, head_dim_v=40),
    "odd values": Case(head_dim=16, head_dim_v=7),
    "head 80": Case(head_dim=80, seqlen_q=33, seqlen_k=50),
    "no batch": Case(batch=0),
    "no queries": Case(seqlen_q=0),
    "no keys": Case(seqlen_k=0),
    "heads by strides": Case(layout="blhd", seqlen_q=70, seqlen_k=70),
    "expanded": Case(layout="expanded"),
    "last stride 2": Case(layout="strided", head_dim=8, seqlen_k=130),
}

OPERANDS = {
    "causal": Case(causal=True, seqlen_q=150, seqlen_k=150),
    "causal long keys": Case(causal=True, seqlen_q=20, seqlen_k=150),
    "causal long queries": Case(causal=True, seqlen_q=150, seqlen_k=20),
    "lower right": Case(causal="lower_right", seqlen_q=20, seqlen_k=150),
    "lower right, empty rows": Case(causal="lower_right", seqlen_q=150, seqlen_k=20),
    "window": Case(window=(10, 3), seqlen_q=150, seqlen_k=170),
    "window left": Case(window=(30, -1), seqlen_q=150, seqlen_k=150),
    "causal window": Case(window=(20, 0), causal=True, seqlen_q=300, seqlen_k=300, num_heads=1,
                          num_heads_kv=1),
    "padding": Case(padding="mask", batch=3, seqlen_k=200),
    "padding with holes": Case(padding="holes", seqlen_k=300),
    "padding, empty sequence": Case(padding="empty", seqlen_k=70),
    "lengths": Case(padding="lengths", batch=3, seqlen_k=200),
    "mask": Case(mask="bhqk", seqlen_q=70, seqlen_k=140),
    "mask over heads": Case(mask="b1qk"),
    "mask of keys": Case(mask="b11k"),
    "mask of queries": Case(mask="11q1"),
    "bias": Case(bias="bhqk", seqlen_q=70, seqlen_k=140),
    "bias over batch": Case(bias="1hqk", seqlen_q=70, seqlen_k=140),
    "bias over all": Case(bias="11qk"),
    "bias of keys": Case(bias="b11k"),
    "bias of queries": Case(bias="1hq1"),
    "alibi": Case(alibi=True, seqlen_q=50, seqlen_k=80),
    "softcap": Case(softcap=2.0, scale=1.0),
    "negative scale": Case(scale=-0.3, causal=True),
    "zero scale": Case(scale=0.0, causal=True),
    "grouped heads": Case(num_heads=6, num_heads_kv=2, seqlen_q=70),
    "one key head": Case(num_heads=4, num_heads_kv=1, causal=True),
    "dropout": Case(dropout_p=0.4, seqlen_q=70, seqlen_k=140),
    "dropout, causal, odd": Case(dropout_p=0.2, causal=True, seqlen_q=37, seqlen_k=37),
    "dropout of all": Case(dropout_p=1.0),
    "everything": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=90, seqlen_k=150, head_dim=20, head_dim_v=12,
        causal="lower_right", window=(100, 50), padding="mask", mask="b1qk", bias="1hqk",
        alibi=True, softcap=5.0, scale=0.5, dropout_p=0.1, layout="blhd",
    ),
}  # fmt: skip

WEIGHTS = {
    "average": Case(weights="average", num_heads=4, seqlen_q=70, seqlen_k=140),
    "per head": Case(weights="per_head", seqlen_q=70, seqlen_k=140),
    "average, causal": Case(weights="average", causal=True, seqlen_q=70, seqlen_k=70),
    "average, grouped, padded": Case(
        weights="average", num_heads=4, num_heads_kv=2, padding="empty"
    ),
    "per head, dropout, mask": Case(weights="per_head", dropout_p=0.3, mask="b1qk"),
    "average, bias, dropout": Case(weights="average", dropout_p=0.3, bias="1hqk"),
    "average, no keys": Case(weights="average", seqlen_k=0),
}

# Up to 16 queries of all heads that share keys take one pass over the keys on the CPU: numbers of
# rows below, at and above its blocks, and every operand that may differ between the heads.
FEW_QUERIES = {
    "2 rows": Case(num_heads=4, seqlen_q=1, seqlen_k=300, head_dim=80),
    "3 rows": Case(num_heads=2, num_heads_kv=1, batch=3, seqlen_q=1, seqlen_k=130, head_dim=24),
    "6 rows, odd": Case(
        num_heads=3, num_heads_kv=1, seqlen_q=2, seqlen_k=261, head_dim=33, head_dim_v=65
    ),
    "8 rows, wide": Case(num_heads=2, num_heads_kv=1, seqlen_q=4, seqlen_k=129, head_dim=192),
    "16 rows": Case(seqlen_q=16, seqlen_k=200, head_dim=64),
    "17 rows": Case(seqlen_q=17, seqlen_k=200, head_dim=64),
    "several passes": Case(num_heads=7, num_heads_kv=1, seqlen_q=3, seqlen_k=140, head_dim=32),
    "grouped causal": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=5, seqlen_k=300, causal="lower_right"
    ),
    "grouped window": Case(
        num_heads=4, num_heads_kv=1, seqlen_q=2, seqlen_k=300, window=(130, 0)
    ),
    "grouped softcap, alibi": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=3, seqlen_k=150, softcap=3.0, alibi=True, scale=0.7
    ),
    "grouped dropout": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=2, seqlen_k=150, dropout_p=0.3, padding="holes"
    ),
    "mask of each head": Case(num_heads=4, num_heads_kv=2, seqlen_q=3, seqlen_k=150, mask="bhqk"),
    "mask of all heads": Case(num_heads=4, num_heads_kv=2, seqlen_q=3, seqlen_k=150, mask="b1qk"),
    "bias of each head": Case(num_heads=4, num_heads_kv=2, seqlen_q=2, seqlen_k=150, bias="1hqk"),
    "bias of all heads": Case(num_heads=4, num_heads_kv=2, seqlen_q=2, seqlen_k=150, bias="b1qk"),
    "strided": Case(num_heads=4, num_heads_kv=2, seqlen_q=2, seqlen_k=150, layout="strided"),
}  # fmt: skip

# Worked in before or after the kernels, which know nothing of them.
AROUND = {
    "sinks": Case(sinks=True, seqlen_q=70, seqlen_k=140),
    "sinks, causal, grouped": Case(num_heads=4, sinks=True, causal=True, seqlen_q=66, seqlen_k=66),
    "sinks, empty sequence": Case(sinks=True, padding="empty"),
    "sinks, no keys": Case(sinks=True, seqlen_k=0),
    "sinks, average": Case(sinks=True, weights="average"),
    "sinks, dropout, per head": Case(sinks=True, weights="per_head", dropout_p=0.3),
    "sinks, one query": Case(sinks=True, seqlen_q=1, seqlen_k=300),
    "learned alibi": Case(learned_alibi=True, seqlen_q=50, seqlen_k=80),
    "learned alibi, bias": Case(learned_alibi=True, bias="1hqk", causal=True),
    "learned alibi, sinks, softcap": Case(learned_alibi=True, sinks=True, softcap=3.0, scale=0.7),
}

CASES = {**SIZES, **OPERANDS, **WEIGHTS, **FEW_QUERIES, **AROUND}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(attention_backend: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    if case.learned_alibi and dtype == torch.float64:
        pytest.skip("slopes are float32, and so is their gradient")
    tensors = case.tensors(dtype)
    skip_unless_supported(case, attention_backend, tensors)
    check_against_oracle(
        functools.partial(run_backend, case, attention_backend),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse", "weights"),
        attention_noise,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_bias_may_be_float32(attention_backend: str, dtype: torch.dtype) -> None:
    case = Case(bias="1hqk")
    tensors = case.tensors(dtype)
    tensors["bias"] = tensors["bias"].detach().float().requires_grad_()
    check_against_oracle(
        functools.partial(run_backend, case, attention_backend),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse", "weights"),
        attention_noise,
    )


@pytest.mark.parametrize("name", ["tile", "causal", "everything", "average, bias, dropout"])
def test_results_repeat_bit_for_bit(attention_backend: str, name: str) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32)

    def run() -> list[torch.Tensor]:
        outputs = [x for x in run_backend(case, attention_backend, **tensors) if x is not None]
        wanted = [x for x in tensors.values() if x.requires_grad]
        return [*outputs, *torch.autograd.grad(sum(x.sum() for x in outputs[:1]), wanted)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_gradients_of_a_subset_are_the_same(attention_backend: str) -> None:
    case = Case(bias="1hqk", causal=True)
    tensors = case.tensors(torch.float32)
    out = run_backend(case, attention_backend, **tensors)[0]
    names = ("q", "k", "v", "bias")
    expected = torch.autograd.grad(out.sum(), [tensors[name] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        out = run_backend(case, attention_backend, **alone)[0]
        assert torch.equal(torch.autograd.grad(out.sum(), alone[name])[0], gradient)


def test_out_is_written_in_place(attention_backend: str) -> None:
    import fused_attn

    q, k, v = (torch.randn(2, 3, 50, 8) for _ in range(3))
    expected = fused_attn.attention(q, k, v, backend=attention_backend)
    out = torch.full((2, 50, 3, 8), float("nan")).transpose(1, 2)
    result = fused_attn.attention(q, k, v, out=out, backend=attention_backend)
    assert result is out
    assert torch.equal(out, expected)
