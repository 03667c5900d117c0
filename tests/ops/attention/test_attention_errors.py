"""A caller's mistake: the error names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fused_attn import attention, attention_varlen, explain, merge_attention

B, H, L, S, D = 2, 4, 6, 8, 16


def tensors() -> dict[str, object]:
    return {
        "q": torch.randn(B, H, L, D),
        "k": torch.randn(B, H, S, D),
        "v": torch.randn(B, H, S, D),
    }


MISTAKES = {
    "q rank": ({"q": torch.randn(H, L, D)}, ValueError, r"`q` must have 4 dimensions .* \(4, 6, 16\)"),
    "q type": ({"q": [1.0]}, TypeError, r"`q` must be a tensor, got list"),
    "q integer": ({"q": torch.ones(B, H, L, D, dtype=torch.int64)}, TypeError, r"`q` must be .*int64"),
    "q complex": ({"q": torch.ones(B, H, L, D) * 1j}, TypeError, r"`q` must be .*complex64"),
    "k batch": ({"k": torch.randn(3, H, S, D)}, ValueError, r"`k` must have shape .*\(3, 4, 8, 16\)"),
    "k head size": ({"k": torch.randn(B, H, S, 5)}, ValueError, r"`k` must have shape"),
    "k dtype": ({"k": torch.randn(B, H, S, D).double()}, TypeError, r"`k` must be torch.float32, got"),
    "k device": ({"k": torch.randn(B, H, S, D, device="meta")}, ValueError, r"`k` must be on cpu"),
    "v keys": ({"v": torch.randn(B, H, S + 1, D)}, ValueError, r"`v` must have shape"),
    "v heads": ({"v": torch.randn(B, 2, S, D)}, ValueError, r"`v` must have shape"),
    "head count": (
        {"k": torch.randn(B, 3, S, D), "v": torch.randn(B, 3, S, D)},
        ValueError,
        r"number of heads .* num_heads=4, num_heads_kv=3",
    ),
    "head size 0": (
        {"q": torch.randn(B, H, L, 0), "k": torch.randn(B, H, S, 0)},
        ValueError,
        r"head_dim=0",
    ),
    "mask integer": ({"mask": torch.ones(L, S, dtype=torch.uint8)}, TypeError, r"`mask` must be torch.bool"),
    "mask shape": (
        {"mask": torch.ones(L, S + 1, dtype=torch.bool)},
        ValueError,
        r"`mask` must be broadcastable to .*\(2, 4, 6, 8\), got \(1, 1, 6, 9\)",
    ),
    "mask rank": (
        {"mask": torch.ones(1, B, H, L, S, dtype=torch.bool)},
        ValueError,
        r"`mask` must be broadcastable",
    ),
    "bias bool": ({"bias": torch.ones(L, S, dtype=torch.bool)}, TypeError, r"`bias` must be torch.float32"),
    "bias dtype": ({"bias": torch.ones(L, S).half()}, TypeError, r"`bias` must be torch.float32, got"),
    "bias shape": ({"bias": torch.ones(3, 1, L, S)}, ValueError, r"`bias` must be broadcastable"),
    "padding shape": (
        {"key_padding_mask": torch.ones(B, L, dtype=torch.bool)},
        ValueError,
        r"`key_padding_mask` must have shape \(B, Lk\) = \(2, 8\), got \(2, 6\)",
    ),
    "padding float": ({"key_padding_mask": torch.ones(B, S)}, TypeError, r"`key_padding_mask` must be torch.bool"),
    "lengths shape": ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"`key_lengths`"),
    "lengths float": ({"key_lengths": torch.ones(B)}, TypeError, r"`key_lengths` must be torch.int64"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, r"`alibi_slopes` must have shape \(H,\) = \(4,\)"),
    "scale nan": ({"scale": float("nan")}, ValueError, r"`scale` must be finite, got nan"),
    "scale inf": ({"scale": float("inf")}, ValueError, r"`scale` must be finite, got inf"),
    "scale text": ({"scale": "1"}, TypeError, r"`scale` must be a number, got str '1'"),
    "softcap": ({"softcap": -1.0}, ValueError, r"`softcap` must be positive.* got -1.0"),
    "dropout high": ({"dropout_p": 1.5}, ValueError, r"`dropout_p` must be in \[0, 1\], got 1.5"),
    "dropout low": ({"dropout_p": -0.1}, ValueError, r"`dropout_p` must be in \[0, 1\], got -0.1"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, r"`dropout_p` must be in"),
    "dropout_rng": (
        {"dropout_p": 0.1, "dropout_rng": torch.ones(2)},
        TypeError,
        r"`dropout_rng` must be torch.int64",
    ),
    "causal": ({"causal": "left"}, ValueError, r"`causal` must be False, True, .* got 'left'"),
    "causal number": ({"causal": 2}, ValueError, r"`causal` must be"),
    "window": ({"window": (1,)}, ValueError, r"`window` must be \(left, right\).* got \(1,\)"),
    "window sign": ({"window": (-2, 0)}, ValueError, r"`window` must be"),
    "weights": ({"return_weights": "mean"}, ValueError, r"`return_weights` must be .* got str 'mean'"),
    "weights flag": ({"return_weights": True}, ValueError, r"`return_weights` must be"),
    "backend": ({"backend": "cdua"}, ValueError, r"`backend` must be one of .* got 'cdua'"),
    "out shape": ({"out": torch.empty(B, H, L, D + 1)}, ValueError, r"`out` must have shape"),
    "out dtype": ({"out": torch.empty(B, H, L, D).half()}, TypeError, r"`out` must be torch.float32"),
    "out gradient": (
        {"out": torch.zeros(B, H, L, D), "q": torch.randn(B, H, L, D, requires_grad=True)},
        ValueError,
        r"`out` must be None where a gradient is wanted",
    ),
    "out gradient of k": (
        {"out": torch.zeros(B, H, L, D), "k": torch.randn(B, H, L, D, requires_grad=True)},
        ValueError,
        r"`out` must be None where a gradient is wanted",
    ),
    "out gradient of bias": (
        {"out": torch.zeros(B, H, L, D), "bias": torch.randn(L, L, requires_grad=True)},
        ValueError,
        r"`out` must be None where a gradient is wanted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    changes, kind, message = MISTAKES[name]
    arguments = {**tensors(), **changes}
    with pytest.raises(kind, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_nothing_is_written_after_a_mistake() -> None:
    q, k, v = tensors().values()
    out = torch.full((B, H, L, D), 7.0)
    with pytest.raises(ValueError, match="scale"):
        attention(q, k, v, out=out, scale=float("nan"))
    assert torch.equal(out, torch.full((B, H, L, D), 7.0))


def test_explain_refuses_what_attention_refuses() -> None:
    q, k, v = tensors().values()
    with pytest.raises(ValueError, match="`scale`"):
        explain(q, k, v, scale=float("nan"))
    with pytest.raises(TypeError, match="unexpected argument `sclae`"):
        explain(q, k, v, sclae=1.0)


PACKED_MISTAKES = {
    "rank": ({"q": torch.randn(1, 5, 2, 4)}, ValueError, r"`q` must have 3 dimensions"),
    "offsets dtype": ({"cu_seqlens_q": torch.tensor([0, 5])}, TypeError, r"`cu_seqlens_q` must be torch.int32"),
    "offsets shape": (
        {"cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32)},
        ValueError,
        r"`cu_seqlens_k` must have shape",
    ),
    "offsets empty": (
        {name: torch.zeros(0, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")},
        ValueError,
        r"`cu_seqlens_q` must hold at least one",
    ),
    "max length": ({"max_seqlen_q": -1}, ValueError, r"`max_seqlen_q` must be an integer >= 0, got int -1"),
    "max length tensor": (
        {"max_seqlen_k": torch.tensor(5)}, ValueError, r"`max_seqlen_k` must be an integer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED_MISTAKES)
def test_packed_mistake_is_named(name: str) -> None:
    changes, kind, message = PACKED_MISTAKES[name]
    starts = torch.tensor([0, 5], dtype=torch.int32)
    arguments = {
        **{x: torch.randn(5, 2, 4) for x in ("q", "k", "v")},
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
    }
    with pytest.raises(kind, match=message):
        attention_varlen(**{**arguments, **changes})


SEQUENCE_MISTAKES = {
    "past the end": ([0, 9], r"`cu_seqlens_q` must end within the 5 rows of the tensor, got 9"),
    "falls": ([0, 4, 2], r"`cu_seqlens_q` must rise by 0 to 9 .*got -2 for sequence 1"),
    "too long": ([0, 5], r"`cu_seqlens_q` must rise by 0 to 3 .*got 5 for sequence 0"),
    "late start": ([1, 5], r"`cu_seqlens_q` must start at 0, got 1"),
}


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("name", SEQUENCE_MISTAKES)
def test_sequences_that_leave_the_tensor_are_refused_by_every_backend(
    attention_backend: str, name: str, which: str
) -> None:
    offsets, message = SEQUENCE_MISTAKES[name]
    wrong = torch.tensor(offsets, dtype=torch.int32)
    right = torch.tensor([0, 1, 2][: len(offsets)], dtype=torch.int32)
    q = torch.randn(5, 2, 4)
    longest = 3 if name == "too long" else 9
    starts = (wrong, right) if which == "q" else (right, wrong)
    with pytest.raises(ValueError, match=message.replace("cu_seqlens_q", f"cu_seqlens_{which}")):
        attention_varlen(q, q, q, *starts, longest, longest, backend=attention_backend)


@pytest.mark.parametrize(("lengths", "number"), [([8, 400], 1), ([-4, 8], 0), ([9, 9], 0)])
def test_lengths_that_no_batch_has_are_refused_by_every_backend(
    attention_backend: str, lengths: list[int], number: int
) -> None:
    q = torch.randn(2, 2, 3, 4, requires_grad=True)
    k = torch.randn(2, 2, 8, 4)
    message = rf"`key_lengths` must be in .* \[0, 8\], got {lengths[number]} for batch element"
    for tensor in (torch.tensor(lengths), torch.tensor(lengths).repeat_interleave(2)[::2]):
        for x in (q, q.detach()):
            with pytest.raises(ValueError, match=message):
                attention(x, k, k, key_lengths=tensor, backend=attention_backend)
    right = torch.tensor([0, 8])
    for _ in range(2):  # a plan is kept, and the values are looked at all the same
        attention(q, k, k, key_lengths=right, backend=attention_backend)
        with pytest.raises(ValueError, match="`key_lengths` must be in"):
            attention(q, k, k, key_lengths=right + 1, backend=attention_backend)


def test_merging_different_shapes_is_refused() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="`out2` must have shape"):
        merge_attention(out, lse, out[:, :1], lse)
    with pytest.raises(ValueError, match="`lse1` must have shape"):
        merge_attention(out, lse[:, :1], out, lse)
