"""The cases of a self-test: small calls of every operation, with all that is likely to go wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import call as attention_call
from ..ops.attention import reference as attention_reference
from ..ops.attention.problem import Operands as AttentionOperands
from ..ops.bias_activation import call as activation_call
from ..ops.bias_activation.problem import Operands as ActivationOperands
from ..ops.embedding import call as embedding_call
from ..ops.embedding.problem import Operands as EmbeddingOperands
from ..ops.layer_norm import call as norm_call
from ..ops.layer_norm.problem import Operands as NormOperands
from ..ops.linear import call as linear_call
from ..ops.linear.problem import Operands as LinearOperands
from ..testing import attention_noise, check_against_oracle

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        size: the larger head size of an attention, else 0; with the dtype it says which kernels are
            meant.
        run: (backend, device) -> None; raises where a result is wrong.
    """

    operation: str
    name: str
    dtype: str
    size: int
    run: Callable[[str, str], None]


def cases(operation: str, quick: bool) -> Iterator[Case]:
    """The cases of an operation."""
    makers = {
        "attention": _attention,
        "layer_norm": _layer_norm,
        "bias_activation": _bias_activation,
        "embedding": _embedding,
        "linear": _linear,
    }
    for dtype in DTYPES:
        yield from makers[operation](dtype, quick)


def _randn(generator: torch.Generator, dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


# (batch, heads, key heads, queries, keys, options): tile edges, grouped heads, every operand.
_CALLS: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "causal": ((2, 4, 2, 200, 200), {"causal": True}),
    "one past the tiles": ((1, 2, 2, 129, 257), {}),
    "decode": ((2, 8, 2, 1, 1025), {"causal": "lower_right"}),
    "padding, bias": ((2, 2, 2, 70, 130), {"padding": True, "bias": True}),
    "mask, window": ((2, 2, 1, 66, 190), {"mask": True, "window": (40, 10)}),
    "slice of a buffer": ((2, 2, 2, 65, 65), {"sliced": True, "causal": True}),
    "dropout": ((1, 2, 2, 70, 90), {"dropout_p": 0.2}),
    "softcap, alibi": ((1, 4, 4, 64, 128), {"softcap": 5.0, "alibi": True}),
}
_QUICK = ("causal", "one past the tiles", "decode", "padding, bias")


def _attention(dtype: str, quick: bool) -> Iterator[Case]:
    for size in (64, 40, 128, 256):
        for name, (sizes, options) in _CALLS.items():
            if quick and (name not in _QUICK or size == 40):
                continue
            run = functools.partial(_run_attention, dtype, size, sizes, options)
            yield Case("attention", f"{name}, head size {size}", dtype, size, run)


def _run_attention(
    dtype: str,
    size: int,
    sizes: tuple[int, int, int, int, int],
    options: dict[str, Any],
    backend: str,
    device: str,
) -> None:
    batch, heads, heads_kv, queries, keys = sizes
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (heads_kv, keys), (heads_kv, keys))
    tensors: dict[str, Tensor] = {}
    for name, (count, length) in zip(("q", "k", "v"), shapes, strict=True):
        x = _randn(g, dtype, batch, count, length, size)
        if options.get("sliced"):
            x = torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., size:]
        tensors[name] = x.to(device).requires_grad_()
    if options.get("bias"):
        tensors["bias"] = _randn(g, dtype, 1, heads, queries, keys).to(device).requires_grad_()
    if options.get("mask"):
        shown = torch.rand(batch, 1, queries, keys, generator=g) < 0.6
        tensors["mask"] = shown.to(device)
    if options.get("padding"):
        lengths = torch.tensor([keys, keys // 2][:batch])
        tensors["key_padding_mask"] = (torch.arange(keys) < lengths[:, None]).to(device)
    if options.get("alibi"):
        tensors["alibi_slopes"] = (2.0 ** -torch.arange(1.0, heads + 1)).to(device)
    if "dropout_p" in options:
        tensors["dropout_rng"] = torch.tensor([7, 11], device=device)
    known = ("causal", "window", "softcap", "dropout_p")
    scalars = attention_call.Scalars(
        **{name: options[name] for name in known if name in options}, return_lse=True
    )

    def ours(**x: Any) -> Sequence[Tensor | None]:
        return attention_call.run(AttentionOperands(**x), scalars._replace(backend=backend))[:2]

    def formula(**x: Any) -> Sequence[Tensor | None]:
        if x.get("alibi_slopes") is not None:
            x["alibi_slopes"] = x["alibi_slopes"].float()
        operands = AttentionOperands(**x)
        problem = attention_call.problem_of(operands, scalars)
        result = attention_reference.forward(
            operands, problem.options, compute_dtype=operands.q.dtype
        )
        return result[:2]

    def noise(outputs: Any, inputs: Any, kind: torch.dtype) -> list[float]:
        return _without_weights(attention_noise((*outputs, None), inputs, kind))

    check_against_oracle(ours, formula, tensors, ("out", "lse"), noise)


def _without_weights(changes: list[float]) -> list[float]:
    return [*changes[:2], *changes[3:]]


def _rows(
    ours: Callable[..., Sequence[Tensor | None]],
    formula: Callable[..., Sequence[Tensor | None]],
    tensors: dict[str, Tensor],
    names: Sequence[str],
    device: str,
) -> None:
    placed = {n: x.detach().to(device).requires_grad_(x.requires_grad) for n, x in tensors.items()}
    check_against_oracle(ours, formula, placed, names)


def _layer_norm(dtype: str, quick: bool) -> Iterator[Case]:
    # The widths grow: a kernel's resources are asked for anew.
    for width in (256, 768, 1000) if quick else (1, 64, 256, 768, 1000, 4096, 8192):
        for rms in (False, True):
            run = functools.partial(_run_norm, dtype, width, rms)
            yield Case("layer_norm", f"{'RMS' if rms else 'layer'} norm of {width}", dtype, 0, run)


def _run_norm(dtype: str, width: int, rms: bool, backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {n: _randn(g, dtype, 37, width).requires_grad_() for n in ("x", "residual")}
    tensors["weight"] = (1 + 0.1 * _randn(g, dtype, width)).requires_grad_()
    scalars = norm_call.Scalars((width,), 1e-5, rms, need_sum=True)

    def run(name: str | None, x: dict[str, Any]) -> Sequence[Tensor | None]:
        return norm_call.run(NormOperands(**x), scalars._replace(backend=name))

    _rows(
        lambda **x: run(backend, x), lambda **x: run("reference", x), tensors, ("y", "sum"), device
    )


def _bias_activation(dtype: str, quick: bool) -> Iterator[Case]:
    for activation in ("relu", "gelu") if quick else ("relu", "gelu", "gelu_tanh", "silu"):
        for gated in (False, True):
            name = f"{'gated ' if gated else ''}{activation}"
            run = functools.partial(_run_activation, dtype, activation, gated)
            yield Case("bias_activation", name, dtype, 0, run)


def _run_activation(dtype: str, activation: str, gated: bool, backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": _randn(g, dtype, 37, 130).requires_grad_(),
        "bias": _randn(g, dtype, 130).requires_grad_(),
    }
    scalars = activation_call.Scalars(activation, gated)

    def run(name: str, x: dict[str, Any]) -> Sequence[Tensor | None]:
        return (activation_call.run(ActivationOperands(**x), scalars._replace(backend=name)),)

    _rows(lambda **x: run(backend, x), lambda **x: run("reference", x), tensors, ("y",), device)


def _linear(dtype: str, quick: bool) -> Iterator[Case]:
    for width in (64, 513) if quick else (1, 64, 513, 1024):
        run = functools.partial(_run_linear, dtype, width)
        yield Case("linear", f"rows of {width}", dtype, 0, run)


def _run_linear(dtype: str, width: int, backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": _randn(g, dtype, 3, 37, width).requires_grad_(),
        "weight": (_randn(g, dtype, 130, width) / width**0.5).requires_grad_(),
        "bias": _randn(g, dtype, 130).requires_grad_(),
    }

    def run(name: str, x: dict[str, Any]) -> Sequence[Tensor | None]:
        return (linear_call.run(LinearOperands(**x), linear_call.Scalars(name)),)

    _rows(lambda **x: run(backend, x), lambda **x: run("reference", x), tensors, ("y",), device)


def _embedding(dtype: str, quick: bool) -> Iterator[Case]:
    for width in (64, 513) if quick else (1, 64, 513, 1024):
        run = functools.partial(_run_embedding, dtype, width)
        yield Case("embedding", f"rows of {width}", dtype, 0, run)


def _run_embedding(dtype: str, width: int, backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "tokens": torch.randint(0, 11, (3, 17), generator=g),
        "weight": _randn(g, dtype, 11, width).requires_grad_(),
        "table": _randn(g, dtype, 20, width).requires_grad_(),
    }
    scalars = embedding_call.Scalars(2.0)

    def run(name: str, x: dict[str, Any]) -> Sequence[Tensor | None]:
        return (embedding_call.run(EmbeddingOperands(**x), scalars._replace(backend=name)),)

    _rows(lambda **x: run(backend, x), lambda **x: run("reference", x), tensors, ("y",), device)
