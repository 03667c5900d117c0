"""Documents, prefixes and chunks: what a dense mask would hide, said by vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import attention, attention_varlen

LQ, LK = 70, 150
SMALL = (40, 70)  # for Triton's interpreter


def runs(seqlen_k: int) -> Tensor:
    return torch.arange(seqlen_k).div(40, rounding_mode="floor").expand(2, seqlen_k)


def mixed(seqlen_k: int) -> Tensor:
    return torch.randint(-2, 3, (2, seqlen_k), generator=torch.Generator().manual_seed(0))


def shown(q: Tensor, k: Tensor, **operands: Any) -> Tensor:
    """The docstring of `attention`, word by word: bool (B, 1, Lq, Lk)."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    causal = operands.get("causal", False)
    p = i if causal in (True, "upper_left") else i + k.shape[2] - q.shape[2]
    prefix = torch.zeros(2, dtype=torch.long)
    prefix = (j < operands.get("prefix_lengths", prefix)[:, None])[:, None, None]
    left, right = operands.get("window") or (-1, -1)
    visible = torch.ones(2, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible &= (p - j >= 0) | prefix
    if left >= 0:
        visible &= (p - j <= left) | prefix
    if right >= 0:
        visible &= (j - p <= right) | prefix
    if "chunk" in operands:
        chunk = operands["chunk"]
        visible &= torch.floor(p / chunk) == torch.floor(j / chunk)
    if "document_ids" in operands:
        ids = operands["document_ids"]
        of_queries, of_keys = (ids, ids) if isinstance(ids, Tensor) else ids
        visible &= (of_queries[:, :, None] == of_keys[:, None, :])[:, None]
    for name in ("mask", "key_padding_mask"):
        if name in operands:
            mask = operands[name]
            visible &= mask if mask.dim() == 4 else mask[:, None, None]
    return visible


def calls(lq: int, lk: int) -> dict[str, dict[str, Any]]:
    in_runs, in_any_order = runs(lk), mixed(lk)
    far = in_any_order * (1 << 40)
    g = torch.Generator().manual_seed(1)
    return {
        "runs": {"document_ids": (in_runs[:, -lq:], in_runs)},
        "runs, causal": {"document_ids": (in_runs[:, -lq:], in_runs), "causal": "lower_right"},
        "mixed": {"document_ids": (in_any_order[:, :lq], in_any_order)},
        "int32": {"document_ids": (in_any_order[:, :lq].int(), in_any_order.int())},
        "one dtype each": {"document_ids": (in_any_order[:, :lq].int(), in_any_order)},
        "beyond 32 bits": {"document_ids": (far[:, :lq], far), "causal": True},
        "strided": {
            "document_ids": (in_any_order.mT.contiguous().mT[:, :lq], torch.stack(
                [in_any_order, far], dim=2)[..., 0])},
        "nobody's queries": {"document_ids": (in_any_order[:, :lq] + 9, in_any_order)},
        "prefix, upper left": {"causal": True, "prefix_lengths": torch.tensor([0, lk - 20])},
        "prefix, lower right": {"causal": "lower_right", "prefix_lengths": torch.tensor([lk, 3])},
        "prefix, window": {"window": (9, 2), "prefix_lengths": torch.tensor([5, 33])},
        "prefix, narrow window": {
            "window": (3, -1), "causal": "lower_right", "prefix_lengths": torch.tensor([17, 0])},
        "prefix, right only": {"window": (-1, 0), "prefix_lengths": torch.tensor([1, lk - 1])},
        "chunk": {"chunk": 32},
        "chunk of one": {"chunk": 1, "causal": True},
        "chunk, causal": {"chunk": 50, "causal": True},
        "chunk, lower right, window": {"chunk": 48, "causal": "lower_right", "window": (20, 0)},
        "all": {
            "document_ids": (in_runs[:, :lq], in_runs), "causal": True, "window": (30, 0),
            "chunk": 64, "prefix_lengths": torch.tensor([lk - 10, 20]),
            "mask": torch.rand(2, 1, lq, lk, generator=g) < 0.8,
            "key_padding_mask": torch.rand(2, lk, generator=g) < 0.9},
    }  # fmt: skip


CALLS = calls(LQ, LK)


@pytest.fixture(autouse=True)
def _skip_what_lacks_kernels(request: pytest.FixtureRequest) -> None:
    """By the backend's own reasons; those that take documents take all of the rest."""
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("attention_backend")
    if backend is not None:
        operands = {"document_ids": IDS, "prefix_lengths": IDS[:, 0], "chunk": 2, "causal": True}
        told = fused_attn.explain(*torch.randn(3, 2, 2, 5, 8), **operands)
        if reasons := dict(told.reasons)[backend]:
            pytest.skip("; ".join(reasons))


def inputs(seqlen_q: int = LQ, seqlen_k: int = LK) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    sizes = ((2, seqlen_q), (1, seqlen_k), (1, seqlen_k))
    return [torch.randn(2, h, n, 16, generator=g).requires_grad_() for h, n in sizes]


def results(given: list[Tensor], **operands: Any) -> list[Tensor]:
    """out, lse and the gradients."""
    g = torch.Generator().manual_seed(4)
    out, lse = attention(*given, return_lse=True, **operands)
    weights = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    kept = [torch.where(lse == -torch.inf, 0.0, x) for x in (lse, weights[1])]
    loss = (out * weights[0]).sum() + (kept[0] * kept[1]).sum()
    return [out, lse, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("name", CALLS)
def test_they_are_what_a_dense_mask_says(attention_backend: str, name: str) -> None:
    sizes = SMALL if attention_backend == "triton" else (LQ, LK)
    operands, given = calls(*sizes)[name], inputs(*sizes)
    if attention_backend == "sdpa":
        pytest.skip("returns no lse")
    found = results(given, backend=attention_backend, **operands)
    mask = shown(given[0], given[1], **operands)
    assert not mask.all()
    expected = results(given, mask=mask, backend="reference")
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seqlen_q", [1, 3, 90])
def test_few_queries_and_more_queries_than_keys(attention_backend: str, seqlen_q: int) -> None:
    """Decoding, and positions below 0."""
    seqlen_k = 70 if seqlen_q > 3 else 600  # which are split
    given = inputs(seqlen_q, seqlen_k)
    ids = torch.arange(seqlen_q).div(3, rounding_mode="floor").expand(2, seqlen_q)
    for operands in (
        {"document_ids": (ids + 1, runs(seqlen_k)), "window": (-1, 60)},
        {"document_ids": (mixed(seqlen_k)[:, :1].expand(2, seqlen_q), mixed(seqlen_k))},
        {"causal": "lower_right", "chunk": 40},
        {"causal": "lower_right", "window": (5, 0), "prefix_lengths": torch.tensor([7, 50])},
    ):
        out = attention(*given, backend=attention_backend, **operands)
        mask = shown(given[0], given[1], **operands)
        torch.testing.assert_close(out, attention(*given, mask=mask, backend="reference"))


def test_weights_know_them(attention_backend: str) -> None:
    given = inputs(*SMALL)
    told = fused_attn.explain(*given, return_weights="average")
    if reasons := dict(told.reasons)[attention_backend]:
        pytest.skip("; ".join(reasons))
    for name in ("runs, causal", "prefix, window", "chunk", "all"):
        operands = calls(*SMALL)[name]
        mask = shown(given[0], given[1], **operands)
        for actual, expected in zip(
            attention(*given, return_weights="average", backend=attention_backend, **operands),
            attention(*given, return_weights="average", mask=mask, backend="reference"),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)


def test_hidden_keys_may_hold_nan(attention_backend: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 60, 16)
    ids = torch.full((2, 60), 5)
    ids[:, 20:30] = 6
    k[:, :, 20:30] = v[:, :, 20:30] = torch.nan
    of_queries = torch.full((2, 60), 5)
    backend = {"backend": attention_backend}
    assert attention(q, k, v, document_ids=(of_queries, ids), **backend).isfinite().all()
    k[:, :, :30] = v[:, :, :30] = torch.nan
    assert attention(q[:, :, 35:], k, v, chunk=30, **backend).isfinite().all()


def test_a_document_of_ones_own_is_a_batch_element() -> None:
    """By hand: a packed row equals the documents one by one, at every place."""
    q, k, v = torch.randn(3, 1, 2, 24, 8)
    ids = torch.tensor([[7] * 10 + [1] * 13 + [3]])
    out = attention(q, k, v, document_ids=ids)
    for rows in (slice(0, 10), slice(10, 23), slice(23, 24)):
        alone = attention(q[:, :, rows], k[:, :, rows], v[:, :, rows])
        torch.testing.assert_close(out[:, :, rows], alone)


PACKED: dict[str, dict[str, Any]] = {
    "mask": {"mask": torch.rand(3, 1, 40, 50, generator=torch.Generator().manual_seed(5)) < 0.6},
    "mask of one head row": {"mask": torch.rand(1, 2, 1, 50) < 0.6, "causal": "lower_right"},
    "bias": {"bias": torch.randn(3, 2, 40, 50)},
    "bias of rows": {"bias": torch.randn(2, 40, 1), "causal": True},
    "bias (q, k)": {"bias": torch.randn(40, 50), "softcap": 2.0},
    "documents": {"document_ids": (torch.arange(70) // 9, torch.arange(90) // 12)},
    "chunk": {"chunk": 16},
    "chunk, lower right": {"chunk": 7, "causal": "lower_right"},
    "prefix": {"prefix_lengths": torch.tensor([0, 30, 3]), "window": (4, 1)},
    "all": {
        "document_ids": (torch.arange(70) // 19, torch.arange(90) // 32), "chunk": 30,
        "prefix_lengths": torch.tensor([5, 30, 3]), "causal": True,
        "bias": torch.randn(1, 2, 40, 50), "mask": torch.rand(3, 1, 40, 50) < 0.9},
}  # fmt: skip
LENGTHS = ((25, 50), (40, 33), (3, 5))


@pytest.mark.parametrize("name", PACKED)
def test_packed_batches_have_them(attention_backend: str, name: str) -> None:
    given = [torch.randn(70, 2, 16), torch.randn(90, 1, 16), torch.randn(90, 1, 16)]
    operands = {n: x.clone() if n == "bias" else x for n, x in PACKED[name].items()}
    learned = [x.requires_grad_() for x in given]
    if "bias" in operands:
        learned.append(operands["bias"].requires_grad_())
    starts = [
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32)
        for n in zip(*LENGTHS, strict=True)
    ]
    out, lse = attention_varlen(
        *given, *starts, 40, 50, return_lse=True, backend=attention_backend, **operands
    )
    parts = []
    for n, (length_q, length_k) in enumerate(LENGTHS):
        rows_q = slice(int(starts[0][n]), int(starts[0][n]) + length_q)
        rows_k = slice(int(starts[1][n]), int(starts[1][n]) + length_k)
        local = dict(operands)
        for dense in ("mask", "bias"):
            if dense in local:
                x = local[dense]
                x = x[(None,) * (4 - x.dim())].expand(3, -1, -1, -1)[n : n + 1]
                local[dense] = x[:, :, :length_q, :length_k]
        if "document_ids" in local:
            ids, ids_k = local["document_ids"]
            local["document_ids"] = (ids[None, rows_q], ids_k[None, rows_k])
        if "prefix_lengths" in local:
            local["prefix_lengths"] = local["prefix_lengths"][n : n + 1].clamp(max=length_k)
        parts.append(
            attention(
                *(x[None, rows] for x, rows in zip(given, (rows_q, rows_k, rows_k), strict=True)),
                layout="blhd",
                return_lse=True,
                backend="reference",
                **local,
            )
        )
    expected = torch.cat([part[0][0] for part in parts])
    torch.testing.assert_close(out[:68], expected)
    torch.testing.assert_close(lse[:, :68], torch.cat([part[1][0] for part in parts], dim=1))
    assert (out[68:] == 0).all()
    dout = torch.randn_like(expected)
    found = torch.autograd.grad((out[:68] * dout).sum(), learned)
    for actual, right in zip(
        found, torch.autograd.grad((expected * dout).sum(), learned), strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=2e-5, atol=2e-5)


def test_they_compile(attention_backend: str) -> None:
    torch._dynamo.reset()
    ids, prefix = runs(50)[:, 20:], torch.tensor([4, 18])

    def run(q: Tensor, ids: Tensor, prefix: Tensor) -> Tensor:
        return attention(
            q, q, q, causal=True, document_ids=ids, prefix_lengths=prefix, chunk=12,
            backend=attention_backend,
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 1, 30, 8, requires_grad=True)
    expected = run(q, ids, prefix)
    torch.testing.assert_close(compiled(q, ids, prefix), expected)
    for a, b in zip(
        torch.autograd.grad(compiled(q, ids, prefix).sum(), q),
        torch.autograd.grad(expected.sum(), q),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_backward_as_a_function_knows_them(attention_backend: str) -> None:
    if attention_backend == "sdpa":
        pytest.skip("returns no lse")
    given = inputs(*SMALL)
    for name in ("runs, causal", "prefix, window"):
        arguments = {**calls(*SMALL)[name], "backend": attention_backend}
        out, lse = attention(*given, return_lse=True, **arguments)
        dout = torch.randn_like(out)
        found = fused_attn.attention_backward(dout, *given, out, lse, **arguments)
        expected = torch.autograd.grad(out, given, dout)
        for actual, right in zip(found[:3], expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=2e-5, atol=2e-5)


IDS = torch.zeros(2, 5, dtype=torch.long)
FIRST, LONGER = IDS[:, 0], torch.randn(2, 2, 7, 8)
SHAPE = r"`document_ids` must have shape \(B, L"
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one tensor for two lengths": (
        {"document_ids": IDS, "k": LONGER, "v": LONGER}, ValueError,
        r"`document_ids` must be a pair .* where there are 5 queries and 7 keys"),
    "three": ({"document_ids": (IDS,) * 3}, TypeError, "`document_ids` must be a tensor or a pair"),
    "a list of numbers": (
        {"document_ids": [0, 1]}, TypeError, "`document_ids` must be a tensor, got int"),
    "float ids": (
        {"document_ids": IDS.float()}, TypeError,
        "`document_ids` must be torch.int32 or torch.int64, got torch.float32"),
    "ids of another length": (
        {"document_ids": IDS[:, :4]}, ValueError, SHAPE + r"q\) = \(2, 5\), got \(2, 4\)"),
    "ids of one row": ({"document_ids": IDS[0]}, ValueError, SHAPE + "q"),
    "wrong ids of keys": (
        {"document_ids": (IDS, IDS[:, 1:])}, ValueError, SHAPE + r"k\) = \(2, 5\), got \(2, 4\)"),
    "prefix alone": (
        {"prefix_lengths": FIRST}, ValueError,
        "`prefix_lengths` must come with `causal` or `window`"),
    "prefix of int32": (
        {"prefix_lengths": FIRST.int(), "causal": True}, TypeError,
        "`prefix_lengths` must be torch.int64"),
    "prefix of another batch": (
        {"prefix_lengths": IDS[0], "causal": True}, ValueError,
        r"`prefix_lengths` must have shape \(B,\) = \(2,\), got \(5,\)"),
    "a number": (
        {"prefix_lengths": 3, "causal": True}, TypeError,
        "`prefix_lengths` must be a tensor, got int 3"),
    "prefix beyond the keys": (
        {"prefix_lengths": FIRST + 6, "causal": True}, ValueError,
        r"`prefix_lengths` must be in \[0, Lk\] = \[0, 5\], got 6 for batch element 0"),
    "negative prefix": (
        {"prefix_lengths": FIRST - 1, "causal": True}, ValueError,
        r"`prefix_lengths` must be in \[0, Lk\]"),
    "chunk 0": ({"chunk": 0}, ValueError, "`chunk` must be at least 1, got 0"),
    "chunk of a float": ({"chunk": 2.0}, TypeError, "`chunk` must be an int, got float 2.0"),
    "chunk True": ({"chunk": True}, TypeError, "`chunk` must be an int, got bool True"),
    "another's name": (
        {"segment_ids": IDS}, TypeError, "argument `segment_ids`\nhint: `document_ids=`"),
    "chunk_size": ({"chunk_size": 3}, TypeError, "argument `chunk_size`\nhint: `chunk=`"),
    "a mask for a whole cache": (
        {"mask": torch.ones(2, 1, 5, 9).bool()}, ValueError,
        r"`mask` must be broadcastable .* got \(2, 1, 5, 9\)\nhint: `mask\[..., :5\]`"),
    "a bias for a whole cache": (
        {"bias": torch.ones(5, 9)}, ValueError,
        r"`bias` must be broadcastable .*\nhint: `bias\[..., :5\]`"),
    "padding for a whole cache": (
        {"key_padding_mask": torch.ones(2, 9).bool()}, ValueError,
        r"`key_padding_mask` must have shape \(B, Lk\) = \(2, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    changes, error, words = MISTAKES[name]
    tensors = {n: torch.randn(2, 2, 5, 8) for n in ("q", "k", "v")} | changes
    with pytest.raises(error, match=words):
        attention(**tensors)


def test_mistakes_with_packed_batches_are_named() -> None:
    q, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    call = (q, q, q, starts, starts, 5, 5)
    ids = torch.zeros(9, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"`document_ids` must have shape \(Tq,\) = \(9,\)"):
        attention_varlen(*call, document_ids=ids[:8])
    with pytest.raises(ValueError, match=r"`document_ids` must have shape \(Tk,\) = \(9,\)"):
        attention_varlen(*call, document_ids=(ids, ids[None]))
    with pytest.raises(ValueError, match=r"\(N, H, max_seqlen_q, max_seqlen_k\) = \(2, 2, 5, 5\)"):
        attention_varlen(*call, mask=torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`prefix_lengths` must have shape \(B,\) = \(2,\)"):
        attention_varlen(*call, prefix_lengths=torch.tensor([1, 2, 3]), causal=True)


def test_explain_names_them() -> None:
    q = torch.randn(1, 2, 6, 8)
    told = fused_attn.explain(q, q, q, document_ids=torch.zeros(1, 6).long(), chunk=2)
    assert "query_documents" in str(told)
    assert "chunk=2" in str(told)
    starts = torch.tensor([0, 6], dtype=torch.int32)
    mask = torch.ones(6, 6, dtype=torch.bool)
    rows = q[0].transpose(0, 1)
    packed = (rows, rows, rows, starts, starts, 6, 6)
    told = fused_attn.explain(attention_varlen, *packed, mask=mask)
    assert "has no kernels for `mask` of packed batches" in dict(told.reasons)["cuda"]
