"""Shared memory: found exactly, by the sets of bytes that two tensors have."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fused_attn import add_layer_norm, attention, bias_activation, layer_norm
from fused_attn.runtime import overlap


def bytes_of(tensor: Tensor) -> list[int]:
    """Address of every byte of every element, counted from the storage's start."""
    size = tensor.element_size()
    starts = torch.zeros(tensor.shape, dtype=torch.int64) + tensor.storage_offset() * size
    for dim, (count, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(count) * stride * size
        starts = starts + steps.view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return [start + i for start in starts.flatten().tolist() for i in range(size)]


def random_view(rng: random.Random, base: Tensor) -> Tensor:
    dims = rng.randint(0, 3)
    while True:
        shape = [rng.randint(1, 5) for _ in range(dims)]
        stride = [rng.choice((0, 1, 2, 3, 5, 7, 12)) for _ in range(dims)]
        reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if reach < base.numel():
            return base.as_strided(shape, stride, rng.randint(0, base.numel() - 1 - reach))


@pytest.mark.parametrize("seed", range(50))
def test_agrees_with_the_sets_of_bytes(seed: int) -> None:
    rng = random.Random(seed)
    base = torch.empty(60, dtype=torch.float32)
    for _ in range(40):
        a, b = random_view(rng, base), random_view(rng, base)
        if rng.random() < 0.3:
            b = random_view(rng, base.view(torch.float16))
        found = overlap.share_memory(a, b)
        assert found == bool(set(bytes_of(a)) & set(bytes_of(b))), (a.shape, a.stride(), b.stride())
        mine = bytes_of(a)
        assert overlap._overlaps_itself(a) == (len(set(mine)) < len(mine)), (a.shape, a.stride())


def test_parts_of_one_buffer_side_by_side_are_apart() -> None:
    buffer = torch.randn(2, 3, 40, 4 * 16)
    q, k, v, out = buffer.split(16, dim=-1)
    expected = attention(q, k, v)
    assert torch.equal(attention(q, k, v, out=out), expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_attention_does_not_write_over_what_it_reads(attention_backend: str, name: str) -> None:
    tensors = {n: torch.randn(1, 2, 16, 16) for n in ("q", "k", "v", "bias")}
    before = {n: x.clone() for n, x in tensors.items()}
    for out in (tensors[name], tensors[name].flip(0).as_strided((1, 2, 16, 16), (0, 256, 16, 1))):
        if out.data_ptr() != tensors[name].data_ptr():
            out = tensors[name].transpose(2, 3)
        with pytest.raises(ValueError, match=f"`out` must share no memory with `{name}`"):
            attention(**tensors, out=out, backend=attention_backend)
    assert all(torch.equal(x, before[n]) for n, x in tensors.items())


def test_a_mask_is_no_place_to_write_to() -> None:
    memory = torch.zeros(1, 1, 8, 8)
    mask = memory.view(torch.bool)[..., :8]
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match="`out` must share no memory with `mask`"):
        attention(q, q, q, mask=mask, out=memory)


def test_norms_work_in_place_on_the_very_same_tensor(layer_norm_backend: str) -> None:
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    expected = layer_norm(x, (8,), backend=layer_norm_backend)
    y, total = add_layer_norm(x, residual, (8,), return_sum=True, backend=layer_norm_backend)
    mine, other = x.clone(), residual.clone()
    layer_norm(mine, (8,), out=mine, backend=layer_norm_backend)
    assert torch.equal(mine, expected)
    mine = x.clone()
    add_layer_norm(
        mine, other, (8,), return_sum=True, out=mine, sum_out=other, backend=layer_norm_backend
    )
    assert torch.equal(mine, y)
    assert torch.equal(other, total)


def test_norms_refuse_every_other_overlap(layer_norm_backend: str) -> None:
    buffer = torch.randn(6, 4)
    before = buffer.clone()
    weight = torch.ones(4)

    def refused(text: str, x: Tensor, **arguments: Tensor) -> None:
        with pytest.raises(ValueError, match=text):
            layer_norm(x, (4,), backend=layer_norm_backend, **arguments)

    refused("`out` must be `x` itself or share no memory", buffer[:4], out=buffer[1:5])
    refused("`out` must have a place in memory for each", buffer[:4], out=weight.expand(4, 4))
    refused("`out` must share no memory with `weight`", weight[None], weight=weight,
            out=weight[None])  # fmt: skip
    with pytest.raises(ValueError, match="`out` must share no memory with `sum_out`"):
        add_layer_norm(
            buffer[:2], buffer[2:4], (4,), return_sum=True, out=buffer[4:], sum_out=buffer[4:],
            backend=layer_norm_backend,
        )  # fmt: skip
    assert torch.equal(buffer, before)


def test_the_same_memory_in_another_order_is_not_the_same_tensor(
    layer_norm_backend: str, bias_activation_backend: str
) -> None:
    """A square and what it is transposed: address, shape and dtype are equal, elements are not."""
    x = torch.randn(8, 8)
    before, turned = x.clone(), x.t()
    assert not overlap.is_same(x, turned)
    assert overlap.is_same(x, x.view(8, 8))
    other = torch.randn(8, 8)
    text = "`out` must be `x` itself or share no memory"
    for given, out in ((x, turned), (turned, x)):
        with pytest.raises(ValueError, match=text):
            layer_norm(given, (8,), out=out, backend=layer_norm_backend)
        with pytest.raises(ValueError, match=text):
            add_layer_norm(given, other, (8,), out=out, backend=layer_norm_backend)
        with pytest.raises(ValueError, match="`sum_out` must be `residual` itself or share no"):
            add_layer_norm(
                other, given, (8,), return_sum=True, sum_out=out, backend=layer_norm_backend
            )
        with pytest.raises(ValueError, match=text):
            bias_activation(given, activation="gelu", out=out, backend=bias_activation_backend)
    assert torch.equal(x, before)


def test_bias_activation_in_place_and_not(bias_activation_backend: str) -> None:
    x = torch.randn(6, 8)
    how = {"activation": "gelu", "backend": bias_activation_backend}
    expected = bias_activation(x, **how)
    mine = x.clone()
    bias_activation(mine, out=mine, **how)
    assert torch.equal(mine, expected)
    with pytest.raises(ValueError, match="`out` must be `x` itself or share no memory"):
        bias_activation(x[:4], out=x[2:], **how)
    for out in (x[:, 4:], x[:, 1:5]):
        with pytest.raises(ValueError, match="`out` must be `x` itself or share no memory"):
            bias_activation(x, gated=True, out=out, **how)
    gates = x.clone()
    expected = bias_activation(x, gated=True, **how)
    assert torch.equal(bias_activation(gates, gated=True, out=gates[:, :4], **how), expected)
    with pytest.raises(ValueError, match="`out` must be `x` itself or share no memory"):
        bias_activation(x[:4], out=x[2:], **how)
    with pytest.raises(ValueError, match="`out` must share no memory with `bias`"):
        bias_activation(x[:1], x[1], out=x[1:2], **how)
