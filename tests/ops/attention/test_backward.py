"""`attention_backward`: what autograd would compute, from out and lse that somebody else kept."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import fused_attn

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap": {"window": (7, 2), "softcap": 3.0},
    "mask": {"mask": torch.rand(2, 1, 20, 30) < 0.7},
    "bias": {"bias": torch.randn(4, 20, 30)},
    "padding": {"key_padding_mask": torch.rand(2, 30) < 0.6},
    "lengths": {"key_lengths": torch.tensor([0, 17])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0])},
    "sinks": {"sinks": torch.randn(4)},
    "dropout": {"dropout_p": 0.3, "dropout_rng": torch.tensor([7, 3])},
}


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_autograd(attention_backend: str, name: str, layout: str) -> None:
    arguments = {**CASES[name], "layout": layout, "backend": attention_backend}
    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    if layout == "blhd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    inputs = {"q": q, "k": k, "v": v}
    for extra in ("bias", "sinks"):
        if extra in arguments:
            inputs[extra] = arguments[extra] = arguments[extra].clone()
    for x in inputs.values():
        x.requires_grad_()
    out, lse = fused_attn.attention(q, k, v, return_lse=True, **arguments)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), list(inputs.values()), (dout, dlse))
    found = fused_attn.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **arguments)
    for field, right in zip(inputs, expected, strict=True):
        torch.testing.assert_close(getattr(found, f"d{field}"), right, rtol=2e-5, atol=2e-5)
    for absent in {"bias", "sinks"} - inputs.keys():
        assert getattr(found, f"d{absent}") is None


@pytest.mark.parametrize("of_bias", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_dtypes_of_their_tensors(
    attention_backend: str, dtype: torch.dtype, of_bias: torch.dtype | None
) -> None:
    """Autograd would make them so; who calls this gets what the kernels have added up."""
    q, k, v = torch.randn(3, 1, 2, 5, 16).to(dtype)
    bias, sinks = torch.randn(1, 2, 5, 5).to(of_bias or dtype), torch.randn(2).to(dtype)
    for arguments in ({"bias": bias}, {"sinks": sinks}, {"bias": bias, "sinks": sinks}):
        against = dict(fused_attn.explain(q, k, v, return_lse=True, **arguments).reasons)
        if against.get(attention_backend):
            continue
        options = {**arguments, "backend": attention_backend}
        out, lse = fused_attn.attention(q, k, v, return_lse=True, **options)
        found = fused_attn.attention_backward(out, q, k, v, out, lse, **options)
        for name, x in {"q": q, "k": k, "v": v, **arguments}.items():
            gradient = getattr(found, f"d{name}")
            assert (name, gradient.dtype, gradient.shape) == (name, x.dtype, x.shape)


def test_parts_of_the_keys_add_up(attention_backend: str) -> None:
    """As in ring attention: each part is given out and lse of the whole."""
    q, k, v = torch.randn(3, 1, 2, 24, 16)
    out, lse = fused_attn.attention(q, k, v, return_lse=True, backend=attention_backend)
    dout = torch.randn_like(out)
    whole = fused_attn.attention_backward(dout, q, k, v, out, lse, backend=attention_backend)
    parts = [
        fused_attn.attention_backward(
            dout, q, k[:, :, rows], v[:, :, rows], out, lse, backend=attention_backend
        )
        for rows in (slice(0, 9), slice(9, 24))
    ]
    torch.testing.assert_close(parts[0].dq + parts[1].dq, whole.dq)
    for name in ("dk", "dv"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=2)
        torch.testing.assert_close(joined, getattr(whole, name))


@pytest.mark.parametrize("name", ["plain", "softcap", "alibi", "dropout", "bias", "sinks"])
def test_parts_of_the_keys_in_every_form_of_a_call(attention_backend: str, name: str) -> None:
    """With lse that of twice the keys, each probability is half, and so is each gradient."""
    dtype = torch.float64 if attention_backend in ("cpu", "reference") else torch.float32
    arguments = {
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
        "dropout": {"dropout_p": 0.3, "dropout_rng": torch.tensor([7, 3])},
        "bias": {"bias": torch.randn(2, 24, 24, dtype=dtype)},
        "sinks": {"sinks": torch.randn(2, dtype=dtype)},
    }.get(name, {})
    q, k, v = torch.randn(3, 1, 2, 24, 16, dtype=dtype)
    run = functools.partial(fused_attn.attention_backward, backend=attention_backend)
    out, lse = fused_attn.attention(
        q, k, v, return_lse=True, backend=attention_backend, **arguments
    )
    dout = torch.randn_like(out)
    once = run(dout, q, k, v, out, lse, **arguments)
    again = run(dout, q, k, v, out, lse + math.log(2), **arguments)
    for field in ("dq", "dk", "dv"):
        torch.testing.assert_close(getattr(again, field), getattr(once, field) / 2)


def test_who_has_no_lse_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own attention is what a machine may run by default, and takes no lse."""
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "sdpa")
    q, k, v = torch.randn(3, 1, 2, 24, 16)
    out, lse = fused_attn.attention(q, k, v, return_lse=True)
    dout = torch.randn_like(out)
    found = fused_attn.attention_backward(dout, q, k, v, out, lse + math.log(2))
    right = fused_attn.attention_backward(dout, q, k, v, out, lse, backend="reference")
    for field in ("dq", "dk", "dv"):
        torch.testing.assert_close(getattr(found, field), getattr(right, field) / 2)
    with pytest.raises(fused_attn.UnsupportedError, match="returns no lse"):
        fused_attn.attention_backward(dout, q, k, v, out, lse, backend="sdpa")


def test_only_what_is_needed_is_computed(attention_backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    out, lse = fused_attn.attention(q, k, v, return_lse=True, backend=attention_backend)
    found = fused_attn.attention_backward(
        out, q, k, v, out, lse, needs=("k",), backend=attention_backend
    )
    assert [x is None for x in found] == [True, False, True, True, True]


def test_it_compiles() -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    out, lse = fused_attn.attention(q, k, v, return_lse=True)
    run = torch.compile(fused_attn.attention_backward, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(out, q, k, v, out, lse),
        fused_attn.attention_backward(out, q, k, v, out, lse),
        strict=True,
    ):
        assert (a is None and b is None) or torch.equal(a, b)


def test_wrong_calls_are_refused_by_name() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    out, lse = fused_attn.attention(q, k, v, return_lse=True)
    run = fused_attn.attention_backward
    with pytest.raises(ValueError, match="`out` must have shape"):
        run(out, q, k, v, out[..., :8], lse)
    with pytest.raises(ValueError, match=r"`lse` must have shape \(B, H, Lq\)"):
        run(out, q, k, v, out, lse[..., :3])
    with pytest.raises(TypeError, match=r"`dout` must be torch.float32, got torch.float16"):
        run(out.half(), q, k, v, out, lse)
    with pytest.raises(ValueError, match="`dropout_rng` must be that of the forward"):
        run(out, q, k, v, out, lse, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"`needs` must name operands of the call .*got 'bias'"):
        run(out, q, k, v, out, lse, needs=("bias",))
