"""Small cases worked by hand: each test is named for the fact of docs/design.md that it checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import attention, attention_varlen, merge_attention
from fused_attn.runtime import native
from fused_attn.testing import assert_within_budget
from tests.cases.attention import finest_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def qkv(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(3)]


def weights_if_served(kind: str, backend: str, like: Tensor) -> str | None:
    """`kind`, or None if the backend refuses weights: its outputs are tested without them."""
    x = like.detach()[:1, :1, :1]
    reasons = [
        dict(fused_attn.explain(x, x, x, return_weights=wanted).reasons)[backend]
        for wanted in (None, kind)
    ]
    return kind if reasons[0] == reasons[1] else None


@each_dtype
def test_one_key_gives_its_value(attention_backend: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, n, 5).to(dtype) for n in (3, 1, 1))
    out = attention(q, k, v, backend=attention_backend)
    expected = v.expand(1, 2, 3, 5)
    assert_within_budget("out", out, expected, expected.double())


@each_dtype
def test_equal_scores_average_the_values(attention_backend: str, dtype: torch.dtype) -> None:
    q = torch.zeros(1, 1, 2, 4, dtype=dtype)
    k = torch.randn(1, 1, 4, 4).to(dtype)
    v = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=dtype)[None, None]
    out, lse = attention(q, k, v, return_lse=True, backend=attention_backend)
    assert torch.equal(out, torch.full((1, 1, 2, 1), 3.0, dtype=dtype))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4.0)))


def test_two_keys_by_hand(attention_backend: str) -> None:
    # Scores 0 and ln 3: weights 1/4 and 3/4, lse ln 4.
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3.0)]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    out, lse, weights = attention(
        q, k, v, scale=1.0, return_lse=True, return_weights="per_head", backend=attention_backend
    )
    torch.testing.assert_close(out, torch.tensor([[[[7.0]]]]))
    torch.testing.assert_close(lse, torch.tensor([[[math.log(4.0)]]]))
    torch.testing.assert_close(weights, torch.tensor([[[[0.25, 0.75]]]]))


def visible_keys(backend: str, seqlen_q: int, seqlen_k: int, **masks: object) -> list[list[int]]:
    """Which keys each query sees, read off the weights of equal scores."""
    q, k = torch.zeros(1, 1, seqlen_q, 4), torch.zeros(1, 1, seqlen_k, 4)
    weights = attention(q, k, k, return_weights="per_head", backend=backend, **masks)[1]
    return [row.nonzero().flatten().tolist() for row in weights[0, 0]]


def test_upper_left_causal_aligns_the_first_query_with_the_first_key(attention_backend) -> None:
    for causal in (True, "upper_left"):
        seen = visible_keys(attention_backend, 2, 4, causal=causal)
        assert seen == [[0], [0, 1]]


def test_lower_right_causal_aligns_the_last_query_with_the_last_key(attention_backend) -> None:
    assert visible_keys(attention_backend, 2, 4, causal="lower_right") == [[0, 1, 2], [0, 1, 2, 3]]
    assert visible_keys(attention_backend, 3, 2, causal="lower_right") == [[], [0], [0, 1]]


def test_window_counts_keys_to_the_left_and_right(attention_backend: str) -> None:
    assert visible_keys(attention_backend, 4, 4, window=(1, 0)) == [[0], [0, 1], [1, 2], [2, 3]]
    assert visible_keys(attention_backend, 3, 3, window=(0, 1)) == [[0, 1], [1, 2], [2]]
    assert visible_keys(attention_backend, 3, 3, window=(-1, 0)) == [[0], [0, 1], [0, 1, 2]]


def test_window_without_upper_left_causal_is_aligned_lower_right(attention_backend: str) -> None:
    assert visible_keys(attention_backend, 2, 4, window=(1, 0)) == [[1, 2], [2, 3]]
    assert visible_keys(attention_backend, 2, 4, window=(1, 0), causal=True) == [[0], [0, 1]]


def test_all_masks_must_agree(attention_backend: str) -> None:
    seen = visible_keys(
        attention_backend, 3, 3,
        causal=True,
        key_padding_mask=torch.tensor([[True, False, True]]),
        mask=torch.tensor([[True, True, True], [True, True, True], [False, True, True]]),
        bias=torch.tensor([0.0, 0.0, 0.0]),
    )  # fmt: skip
    assert seen == [[0], [0], [2]]


def test_minus_infinity_in_the_bias_hides_a_key(attention_backend: str) -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    assert visible_keys(attention_backend, 2, 3, bias=bias) == [[0, 2], [0, 2]]


def test_key_lengths_move_no_diagonal(attention_backend: str) -> None:
    lengths = torch.tensor([2])
    seen = visible_keys(attention_backend, 3, 3, key_lengths=lengths, causal="lower_right")
    assert seen == [[0], [0, 1], [0, 1]]


def test_alibi_distance_is_aligned_lower_right(attention_backend: str) -> None:
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    slopes = torch.tensor([math.log(2.0)])
    weights = attention(
        q, k, k, alibi_slopes=slopes, return_weights="per_head", backend=attention_backend
    )[1]
    expected = torch.tensor([[2.0, 4.0, 2.0], [1.0, 2.0, 4.0]])
    torch.testing.assert_close(weights[0, 0], expected / expected.sum(-1, keepdim=True))


def test_softcap_bounds_the_score(attention_backend: str) -> None:
    q, k = torch.full((1, 1, 1, 1), 100.0), torch.tensor([[[[100.0], [-100.0]]]])
    lse = attention(q, k, k, softcap=2.0, return_lse=True, backend=attention_backend)[1]
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(math.exp(2) + math.exp(-2))))


def empty_row_cases() -> dict[str, dict[str, object]]:
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    return {
        "padding": {"key_padding_mask": hidden},
        "length 0": {"key_lengths": torch.tensor([0])},
        "mask": {"mask": torch.zeros(6, 5, dtype=torch.bool)},
        "bias": {"bias": torch.full((6, 5), -torch.inf, requires_grad=True)},
    }


@each_dtype
@pytest.mark.parametrize("name", ["padding", "length 0", "mask", "bias"])
def test_a_row_that_sees_no_key_is_zero(
    attention_backend: str, name: str, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(1, 2, n, 8).to(dtype).requires_grad_() for n in (6, 5, 5))
    masks = empty_row_cases()[name]
    kind = weights_if_served("per_head", attention_backend, q)
    out, lse, *weights = attention(
        q, k, v, return_lse=True, return_weights=kind, backend=attention_backend, **masks
    )
    for zeros in (out, *weights):
        assert torch.equal(zeros, torch.zeros_like(zeros))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    wanted = [q, k, v, *(x for x in masks.values() if x.requires_grad)]
    for gradient in torch.autograd.grad(sum(x.sum() for x in (out, *weights)), wanted):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_keys_at_all_give_zero(attention_backend: str) -> None:
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (6, 0, 0))
    out, lse = attention(q, k, v, return_lse=True, backend=attention_backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


def hiding_cases(seqlen_q: int, seqlen_k: int, poisoned: int) -> dict[str, dict[str, object]]:
    """Ways in which no query sees the keys from `poisoned` on, or that one only."""
    position = torch.arange(seqlen_k)
    return {
        "padding": {"key_padding_mask": (position < poisoned)[None]},
        "hole": {"key_padding_mask": (position != poisoned)[None]},
        "lengths": {"key_lengths": torch.tensor([poisoned])},
        "mask column": {"mask": (position != poisoned).expand(seqlen_q, -1).clone()},
        "mask vector": {"mask": position != poisoned},
        "bias column": {"bias": torch.where(position == poisoned, -torch.inf, 0.0)},
        "causal": {"causal": True},
    }


@each_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["padding", "hole", "lengths", "mask column", "mask vector", "bias column", "causal"]
)
def test_nan_in_a_key_that_nobody_sees_stays_there(
    attention_backend: str, name: str, poison: float, dtype: torch.dtype
) -> None:
    seqlen_q, seqlen_k = (70, 150)
    poisoned = 100 if name != "causal" else 70
    masks = hiding_cases(seqlen_q, seqlen_k, poisoned)[name]
    rows = [poisoned] if name in ("hole", "mask column", "mask vector", "bias column") else None
    rows = list(range(poisoned, seqlen_k)) if rows is None else rows
    clean = [torch.randn(1, 2, n, 24).to(dtype) for n in (seqlen_q, seqlen_k, seqlen_k)]
    results = []
    for value in (0.0, poison):
        q, k, v = (x.clone() for x in clean)
        k[:, :, rows] = value
        v[:, :, rows] = value
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        kind = weights_if_served("average", attention_backend, q)
        outputs = attention(
            q, k, v, return_lse=True, return_weights=kind, backend=attention_backend, **masks
        )
        grads = torch.autograd.grad(sum(x.float().sum() for x in outputs), (q, k, v))
        results.append((*outputs, *grads))
    for expected, actual in zip(*results, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected)


def test_nan_in_a_visible_key_is_not_hidden(attention_backend: str) -> None:
    q, k, v = qkv(1, 1, 20, 8)
    v[0, 0, 3, 2] = float("nan")
    out = attention(q, k, v, causal=True, backend=attention_backend)
    assert out[0, 0, 3:, 2].isnan().all()
    assert out[0, 0, :, :2].isfinite().all()


@each_dtype
def test_extreme_scores_stay_finite(attention_backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 2, 70, 16, dtype=dtype)
    q, k = ((x * 60).requires_grad_() for x in (q, k))
    v.requires_grad_()
    scores = (q.double() @ k.double().transpose(-2, -1)).abs().max()
    assert scores > 1e4
    out, lse = attention(q, k, v, scale=1.0, return_lse=True, backend=attention_backend)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


@each_dtype
def test_the_smallest_finite_bias_is_not_a_mask(attention_backend: str, dtype: torch.dtype) -> None:
    q, k, _ = qkv(1, 2, 4, 8, dtype=dtype)
    bias = torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype)
    bias[0, 0] = 0.0
    v = torch.eye(4, dtype=dtype).expand(1, 2, 4, 4)  # the output then is the weights
    weights = attention(q, k, v, bias=bias, backend=attention_backend).double()
    assert torch.equal(weights[:, :, 0], torch.tensor([1.0, 0, 0, 0]).double().expand(1, 2, 4))
    if dtype != torch.float16:  # -65504 leaves room for the scores to differ
        torch.testing.assert_close(weights[:, :, 1:], torch.full((1, 2, 3, 4), 0.25).double())


def test_lse_joins_two_sets_of_keys(attention_backend: str) -> None:
    dtype = finest_dtype(attention_backend)
    q, k, v = (torch.randn(2, 2, n, 8, dtype=dtype) for n in (10, 30, 30))
    whole, lse = attention(q, k, v, return_lse=True, backend=attention_backend)
    halves = [
        attention(q, k[:, :, part], v[:, :, part], return_lse=True, backend=attention_backend)
        for part in (slice(0, 11), slice(11, 30))
    ]
    out, merged = merge_attention(*halves[0], *halves[1])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(merged, lse)


def test_merging_empty_rows_gives_empty_rows_and_finite_gradients() -> None:
    out = torch.randn(1, 1, 3, 4, requires_grad=True)
    lse = torch.full((1, 1, 3), -torch.inf, requires_grad=True)
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert torch.equal(merged, torch.zeros_like(merged))
    assert torch.equal(merged_lse, lse)
    for gradient in torch.autograd.grad(merged.sum(), (out, lse)):
        assert gradient.isfinite().all()


def test_one_seed_gives_one_dropout_mask_on_every_backend() -> None:
    q, k, v = qkv(2, 2, 70, 8)
    rng = torch.tensor([123456789012345, 42])
    masks = []
    for backend in fused_attn.attention_backends():
        how: Any = {"dropout_p": 0.3, "dropout_rng": rng, "return_weights": "per_head"}
        if fused_attn.explain(q, k, v, backend=backend, **how).chosen:
            masks.append(attention(q, k, v, backend=backend, **how)[1] == 0)
    assert len(masks) >= (1 if native.why_not() else 2)
    assert 0.25 < masks[0].float().mean() < 0.35
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_dropout_is_drawn_from_torchs_generator(attention_backend: str) -> None:
    q, k, v = qkv(1, 2, 40, 8)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, k, v, dropout_p=0.5, backend=attention_backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_lse_is_that_of_the_undropped_softmax(attention_backend: str) -> None:
    q, k, v = qkv(1, 2, 40, 8)
    expected = attention(q, k, v, return_lse=True, backend=attention_backend)[1]
    dropped = attention(q, k, v, return_lse=True, dropout_p=0.5, backend=attention_backend)[1]
    assert torch.equal(dropped, expected)


def test_probability_zero_is_no_dropout(attention_backend: str) -> None:
    q, k, v = qkv(1, 2, 40, 8)
    rng = torch.tensor([1, 2])
    expected = attention(q, k, v, backend=attention_backend)
    actual = attention(q, k, v, dropout_p=0.0, dropout_rng=rng, backend=attention_backend)
    assert torch.equal(actual, expected)


def test_outputs_are_new_and_contiguous(attention_backend: str) -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv(2, 40, 3, 8))
    outputs = attention(
        q, k, v, return_lse=True, return_weights="average", backend=attention_backend
    )
    assert [tuple(x.shape) for x in outputs] == [(2, 3, 40, 8), (2, 3, 40), (2, 1, 40, 40)]
    assert all(x.is_contiguous() for x in outputs)
    assert outputs[1].dtype == torch.float32


@each_dtype
def test_packed_sequences_are_the_sequences_one_by_one(
    attention_backend: str, dtype: torch.dtype
) -> None:
    lengths_q, lengths_k = [5, 0, 70, 3], [7, 4, 131, 0]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q), 4, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), 2, 8, dtype=dtype, requires_grad=True)
            for _ in range(2))  # fmt: skip
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = {"causal": "lower_right", "alibi_slopes": slopes, "backend": attention_backend}
    out, lse = attention_varlen(q, k, v, starts_q, starts_k, 70, 131, return_lse=True, **options)
    pieces = [
        attention(
            q[starts_q[n] : starts_q[n + 1]].transpose(0, 1)[None],
            k[starts_k[n] : starts_k[n + 1]].transpose(0, 1)[None],
            v[starts_k[n] : starts_k[n + 1]].transpose(0, 1)[None],
            return_lse=True, **options,
        )
        for n in range(4)
    ]  # fmt: skip
    expected = torch.cat([piece[0][0].transpose(0, 1) for piece in pieces])
    expected_lse = torch.cat([piece[1][0] for piece in pieces], dim=1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out.is_contiguous()
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("second", [3, 2])  # the last sequence is the shorter or the longer one
@each_dtype
def test_packed_rows_past_the_last_sequence_are_never_read(
    attention_backend: str, dtype: torch.dtype, second: int
) -> None:
    starts = torch.tensor([0, second, 5], dtype=torch.int32)
    q, k, v = (torch.randn(8, 2, 4).to(dtype) for _ in range(3))
    clean = attention_varlen(q[:5], k[:5], v[:5], starts, starts, 3, 3, backend=attention_backend)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with torch.no_grad():
        for x in (q, k, v):
            x[5:] = float("nan")
    out, lse = attention_varlen(
        q, k, v, starts, starts, 3, 3, return_lse=True, backend=attention_backend
    )
    torch.testing.assert_close(out[:5], clean)
    assert torch.equal(out[5:], torch.zeros(3, 2, 4, dtype=dtype))
    assert torch.equal(lse[:, 5:], torch.full_like(lse[:, 5:], -torch.inf))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert torch.equal(gradient[5:], torch.zeros(3, 2, 4, dtype=dtype))


@each_dtype
def test_packed_dropout_is_that_of_the_padded_batch(
    attention_backend: str, dtype: torch.dtype
) -> None:
    lengths = torch.tensor([3, 6])
    starts = torch.tensor([0, 3, 9], dtype=torch.int32)
    q, k, v = qkv(2, 2, 6, 4, dtype=dtype)
    packed = [torch.cat([x[0, :, :3], x[1]], dim=1).transpose(0, 1) for x in (q, k, v)]
    options = {"dropout_p": 0.5, "dropout_rng": torch.tensor([5, 6]), "backend": attention_backend}
    out = attention_varlen(*packed, starts, starts, 6, 6, **options)
    padded = attention(q, k, v, key_lengths=lengths, **options)
    expected = torch.cat([padded[0, :, :3], padded[1]], dim=1).transpose(0, 1)
    torch.testing.assert_close(out, expected)
