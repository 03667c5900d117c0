"""What the copy engine reads and writes: nothing that counts beyond keys, sequences and columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import attention
from fused_attn.ops.attention import cuda
from fused_attn.ops.attention.problem import make_options
from fused_attn.runtime import cuda as cuda_runtime

pytestmark = pytest.mark.skipif(
    not cuda_runtime.emulated(), reason="the emulator is not built (make test builds it)"
)


@pytest.fixture(params=[False, True], ids=["default", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def results(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs, return_lse=True, backend="cuda", **options)
    return (out, lse, *torch.autograd.grad(out.float().sin().sum(), inputs))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
@pytest.mark.parametrize("kind", ["lengths", "causal"])
def test_what_lies_past_the_keys_of_a_dense_tensor_does_not_matter(
    kind: str, general: bool, head_dim: int, deterministic: bool
) -> None:
    """The engine ends dense tensors at their last row, not where their keys end: NaN is read."""
    lengths = torch.tensor([130, 7, 0]) if kind == "lengths" else torch.tensor([70] * 3)
    options: dict[str, Any] = {"softcap": 20.0} if general else {}
    options |= {"key_lengths": lengths} if kind == "lengths" else {"causal": "upper_left"}
    q = torch.randn(3, 2, 70, head_dim).half()
    k, v = torch.randn(3, 1, 200, head_dim).half(), torch.randn(3, 1, 200, head_dim).half()
    expected = results(q, k, v, **options)
    beyond = torch.arange(200)[None, :] >= lengths[:, None]
    k[beyond[:, None]] = torch.nan
    v[beyond[:, None]] = torch.inf
    for found, value in zip(results(q, k, v, **options), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0 if deterministic else 1e-2)


def packed_call(qkv: Tensor, ends: Tensor, longest: int, out: Tensor) -> tuple[Tensor, ...]:
    """(lse, dq, dk, dv) of (rows, 3, heads, head size); nobody checks `ends`."""
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    operands = cuda.Operands(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)
    options = make_options(max_seqlen_q=longest, max_seqlen_k=longest, head_dim=q.shape[3])
    lse = torch.empty(1, q.shape[1], q.shape[2])
    out = out.transpose(0, 1)[None]
    cuda.forward(operands, options, out, lse)
    gradients = [torch.empty_like(q) for _ in range(3)]
    dout = torch.ones_like(out)
    cuda.backward(operands, options, out, lse, dout, None, None, *gradients, None)
    return (lse, *gradients)


def test_sequences_far_down_a_packed_tensor_with_heads_between_rows(deterministic: bool) -> None:
    """q, k and v are slices of one tensor; 64-bit addresses wrap around (cuda/tensor_map.h)."""
    rows, start, lengths = 70_000, 65_000, (130, 65)
    qkv = torch.zeros(rows, 3, 2, 64, dtype=torch.half)
    qkv[start:] = torch.randn(rows - start, 3, 2, 64).half()
    ends = torch.tensor([start, start + lengths[0], start + sum(lengths)], dtype=torch.int32)
    out = torch.empty(rows, 2, 64, dtype=torch.half)
    found = [out.transpose(0, 1)[None], *packed_call(qkv, ends, 130, out)[1:]]
    for begin, end in ((start, start + 130), (start + 130, start + 195)):
        parts = [
            x.transpose(0, 1)[None].detach().requires_grad_() for x in qkv[begin:end].unbind(1)
        ]
        alone = attention(*parts, backend="cuda")
        expected = (alone, *torch.autograd.grad(alone.sum(), parts))
        for whole, part in zip(found, expected, strict=True):
            torch.testing.assert_close(whole[:, :, begin:end], part)


def test_a_sequence_that_claims_rows_past_the_tensor_writes_none(deterministic: bool) -> None:
    """The bounds of a packed map are tight, `rows + 1`: on a GPU nobody reads the lengths back."""
    memory = torch.full((100, 1, 64), 7.0).half()
    qkv = torch.randn(80, 3, 1, 64).half()
    ends = torch.tensor([0, 50, 95], dtype=torch.int32)
    packed_call(qkv, ends, 50, memory[:80])
    assert (memory[80:] == 7.0).all()
    alone = attention(*(x.transpose(0, 1)[None] for x in qkv[:50].unbind(1)), backend="cuda")
    torch.testing.assert_close(memory[:50].transpose(0, 1)[None], alone)


@pytest.mark.parametrize("sizes", [(1, 1, 9, 16), (2, 1, 9, 16), (1, 2, 1, 16), (1, 1, 1, 16)])
def test_strides_of_single_rows_and_heads_may_be_anything(sizes: tuple[int, ...]) -> None:
    """The encoder takes multiples of 16 bytes only; what has one place needs no stride."""
    dense = torch.randn(sizes).half()
    strides = [s if n > 1 else 5 for s, n in zip(dense.stride(), sizes, strict=True)]
    odd = torch.as_strided(dense, sizes, strides)
    assert torch.equal(odd, dense)
    torch.testing.assert_close(
        attention(odd, odd, odd, backend="cuda"), attention(dense, dense, dense, backend="cuda")
    )


@pytest.mark.parametrize("columns", [36, 40, 1, 63])
def test_the_neighbours_of_a_slice_stay_as_they_are(columns: int, deterministic: bool) -> None:
    """Stores of tiles write 16 bytes at a time, also where columns end within them."""
    q, k, v = (torch.randn(2, 2, 70, columns).half() for _ in range(3))
    big = [torch.full((2, 2, 70, 64), 7.0).half() for _ in range(4)]
    out, dq, dk, dv = (x[..., :columns] for x in big)
    lse = torch.empty(2, 2, 70)
    operands = cuda.Operands(q, k, v)
    options = make_options(max_seqlen_q=70, max_seqlen_k=70, head_dim=columns)
    cuda.forward(operands, options, out, lse)
    cuda.backward(operands, options, out, lse, torch.ones_like(out), None, None, dq, dk, dv, None)
    assert all((x[..., columns:] == 7.0).all() for x in big)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    alone = attention(*inputs, backend="cuda")
    expected = (alone, *torch.autograd.grad(alone.sum(), inputs))
    for found, value in zip((out, dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("columns", [36, 40])
def test_out_may_be_a_slice(columns: int) -> None:
    q, k, v = (torch.randn(1, 2, 70, columns).half() for _ in range(3))
    big = torch.full((1, 2, 70, 64), 7.0).half()
    attention(q, k, v, out=big[..., :columns], backend="cuda")
    torch.testing.assert_close(big[..., :columns], attention(q, k, v, backend="cuda"))
    assert (big[..., columns:] == 7.0).all()
