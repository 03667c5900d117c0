"""Faults seen in other implementations, each a regression test of ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import (
    FusedTransformerEncoderLayer,
    attention,
    fuse,
    layer_norm,
    scaled_dot_product_attention,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested", "ignore:The PyTorch API of nested"),
]

N, L, E, H = 3, 6, 16, 4


def heads(*shape: int) -> Tensor:
    return torch.randn(2, 2, *shape)


def layer(**settings) -> FusedTransformerEncoderLayer:
    torch.manual_seed(0)
    return FusedTransformerEncoderLayer(E, H, 24, 0.0, batch_first=True, **settings)


def stack() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True), 2)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_1_causal_with_a_scale_that_is_not_positive(attention_backend: str, scale: float) -> None:
    """torch masks before it scales: -inf times 0 is NaN, times a negative number +inf."""
    q, k, v = heads(5, 4), heads(5, 4), heads(5, 4)
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, backend=attention_backend
    )
    scores = (scale * q @ k.mT).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


@pytest.mark.parametrize("missing", ["k", "v"])
def test_2_keys_and_values_of_different_number_are_refused(missing: str) -> None:
    """torch takes the number from v: a shorter k is read past its end."""
    tensors = {"k": heads(7, 4), "v": heads(7, 4)}
    tensors[missing] = tensors[missing][:, :, :5]
    for function in (attention, scaled_dot_product_attention):
        with pytest.raises(ValueError, match=r"`v(alue)?` must"):
            function(heads(3, 4), tensors["k"], tensors["v"])


@pytest.mark.parametrize("rank", [3, 4])
def test_3_mask_and_causal_together_have_one_rule(attention_backend: str, rank: int) -> None:
    """torch applies both in 4-D and refuses in 3-D."""
    q, k, v = (heads(5, 4) if rank == 4 else heads(5, 4)[0] for _ in range(3))
    mask = torch.rand(5, 5) < 0.7
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=True, backend=attention_backend)
    both = scaled_dot_product_attention(q, k, v, mask.tril(), backend=attention_backend)
    torch.testing.assert_close(out, both)


def test_4_masks_of_one_and_no_dimension_broadcast(attention_backend: str) -> None:
    """torch raises IndexError."""
    q, k, v = heads(5, 4), heads(5, 4), heads(5, 4)
    for mask in (torch.randn(5), torch.tensor(0.5), torch.rand(5) < 0.7, torch.tensor(True)):
        out = scaled_dot_product_attention(q, k, v, mask, backend=attention_backend)
        expected = F.scaled_dot_product_attention(q, k, v, mask.expand(5, 5))
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mask", [
    {"mask": -torch.arange(L).float().expand(L, L)},
    {"mask": torch.linspace(-1, 1, L * L).view(L, L)},
    {"src_key_padding_mask": torch.linspace(-2, 0, N * L).view(N, L)},
], ids=["alibi", "bias", "soft padding"])  # fmt: skip
def test_5_float_masks_are_added_in_inference(mask: dict[str, Tensor]) -> None:
    """torch reads them as bool in eval and no_grad."""
    model, x = stack(), torch.randn(N, L, E)
    expected = model(x, **mask)
    fuse(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(model(x, **mask), expected)


@pytest.mark.parametrize("name", ["self_attn", "norm1"])
def test_6_a_replaced_child_of_a_stock_layer_acts_in_inference(name: str) -> None:
    """torch's inference path calls neither the attention nor the norm of a layer."""

    class Loud(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def __getattr__(self, key: str) -> object:
            try:
                return super().__getattr__(key)
            except AttributeError:
                return getattr(super().__getattr__("inner"), key)

        def forward(self, *args: Tensor, **kwargs: object) -> object:
            self.calls += 1
            return self.inner(*args, **kwargs)

    model, x = stack(), torch.randn(N, L, E)
    fuse(model.eval())
    loud = Loud(getattr(model.layers[0], name))
    setattr(model.layers[0], name, loud)
    with torch.no_grad():
        model(x)
    assert loud.calls == 1


def test_7_padding_under_autocast_raises_no_dtype_error() -> None:
    model, x = stack(), torch.randn(N, L, E)
    hidden = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None]
    expected = model(x, src_key_padding_mask=hidden)
    fuse(model.eval())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(out[~hidden].float(), expected[~hidden], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("pack", [True, False])
def test_8_a_sequence_of_padding_alone_is_finite_and_the_same_in_every_mode(pack: bool) -> None:
    """torch gives NaN on its inference path and numbers in training."""
    ours, x = layer(), torch.randn(N, L, E)
    ours.pack_padding = pack
    hidden = torch.zeros(N, L, dtype=torch.bool)
    hidden[1] = True
    expected = ours(x, src_key_padding_mask=hidden)
    assert expected.isfinite().all()
    expected.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, src_key_padding_mask=hidden), expected)


def test_9_float16_norm_of_a_constant_row_has_finite_gradients(layer_norm_backend: str) -> None:
    x = torch.full((3, 40), 0.3, dtype=torch.float16, requires_grad=True)
    layer_norm(x, 40, eps=1e-9, backend=layer_norm_backend).sum().backward()
    assert x.grad.isfinite().all()


def test_13_padding_of_an_integration_reaches_the_kernel() -> None:
    """Masks got lost on their way into transformers: with a mask, what it hides does not matter."""
    ours, x = layer(), torch.randn(N, L, E)
    hidden = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None]
    other = torch.where(hidden[..., None], torch.randn(N, L, E), x)
    for pack in (True, False):
        ours.pack_padding = pack
        results = [ours(y, src_key_padding_mask=hidden)[~hidden] for y in (x, other)]
        torch.testing.assert_close(*results)


def test_14_second_derivatives_are_right(attention_backend: str) -> None:
    """An operator whose backward is not marked gives a wrong one in silence."""
    q = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor) -> Tensor:
        return attention(q, q.sin(), q.cos(), causal=True, backend=attention_backend)

    def plain(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        second = [
            torch.autograd.functional.hessian(lambda q, f=f: f(q).sin().sum(), q)
            for f in (run, plain)
        ]
    torch.testing.assert_close(*second)
