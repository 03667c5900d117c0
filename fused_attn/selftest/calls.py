"""The calls of a self-test: tensors, the public path of an operation, and its formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
Results = Sequence[Tensor | None]


class Call(NamedTuple):
    """One call.

    Attributes:
        tensors: by name of the operand, on the CPU or wherever `to` put them.
        run: (backend, tensors) -> results.
        formula: (tensors) -> the same in plain PyTorch, in the tensors' dtype.
        names: of the results.
        noise: as for `check_against_oracle`.
    """

    tensors: dict[str, Tensor]
    run: Callable[[str, dict[str, Any]], Results]
    formula: Callable[[dict[str, Any]], Results]
    names: tuple[str, ...]
    noise: Callable[[Any, Any, torch.dtype], list[float]] | None = None

    def to(self, device: str) -> Call:
        return self.placed(lambda x: x.to(device))

    def placed(self, place: Callable[[Tensor], Tensor]) -> Call:
        """With each tensor somewhere else."""
        moved = {
            name: place(x.detach()).requires_grad_(x.requires_grad)
            for name, x in self.tensors.items()
        }
        return self._replace(tensors=moved)

    def check(self, backend: str) -> None:
        """Results and gradients against float64.

        Raises:
            AssertionError: one is over its budget.
        """
        check_against_oracle(
            lambda **x: self.run(backend, x), lambda **x: self.formula(x), self.tensors,
            self.names, self.noise,
        )  # fmt: skip

    def results(self, backend: str) -> list[Tensor]:
        """Outputs and gradients."""
        outputs = [x for x in self.run(backend, self.tensors) if x is not None]
        wanted = [x for x in self.tensors.values() if x.requires_grad]
        floats = [x for x in outputs if x.requires_grad]
        if not wanted or not floats:
            return outputs
        grads = torch.autograd.grad(floats, wanted, [torch.ones_like(x) for x in floats])
        return [*(x.detach() for x in outputs), *grads]


def _randn(generator: torch.Generator, dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def attention(
    dtype: str, size: int, sizes: tuple[int, int, int, int, int], options: dict[str, Any]
) -> Call:
    """`sizes`: batch, heads, key heads, queries, keys; `options`: scalars, and extra operands."""
    batch, heads, heads_kv, queries, keys = sizes
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (heads_kv, keys), (heads_kv, keys))
    tensors: dict[str, Tensor] = {}
    for name, (count, length) in zip(("q", "k", "v"), shapes, strict=True):
        x = _randn(g, dtype, batch, count, length, size)
        if options.get("sliced"):
            x = torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., size:]
        tensors[name] = x.requires_grad_()
    if options.get("bias"):
        tensors["bias"] = _randn(g, dtype, 1, heads, queries, keys).requires_grad_()
    if options.get("mask"):
        tensors["mask"] = torch.rand(batch, 1, queries, keys, generator=g) < 0.6
    if options.get("padding"):
        lengths = torch.tensor([keys, keys // 2][:batch])
        tensors["key_padding_mask"] = torch.arange(keys) < lengths[:, None]
    if options.get("alibi"):
        tensors["alibi_slopes"] = 2.0 ** -torch.arange(1.0, heads + 1)
    if options.get("documents"):
        for name, length in (("query_documents", queries), ("key_documents", keys)):
            tensors[name] = (torch.arange(length) // 70).expand(batch, length).contiguous()
    if options.get("prefix"):
        tensors["prefix_lengths"] = torch.tensor([keys // 3, 1][:batch])
    if "dropout_p" in options:
        tensors["dropout_rng"] = torch.tensor([7, 11])
    known = ("causal", "window", "softcap", "dropout_p", "chunk")
    lse = options.get("lse", True)
    scalars = attention_call.Scalars(
        **{name: options[name] for name in known if name in options}, return_lse=lse
    )

    def run(backend: str, x: dict[str, Any]) -> Results:
        return attention_call.run(AttentionOperands(**x), scalars._replace(backend=backend))[:2]

    def formula(x: dict[str, Any]) -> Results:
        if x.get("alibi_slopes") is not None:
            x = {**x, "alibi_slopes": x["alibi_slopes"].float()}
        operands = AttentionOperands(**x)
        problem = attention_call.problem_of(operands, scalars)
        return attention_reference.forward(
            operands, problem.options, compute_dtype=operands.q.dtype
        )[:2]

    def noise(outputs: Any, inputs: Any, kind: torch.dtype) -> list[float]:
        out, lse, _, *rest = attention_noise((*outputs, None), inputs, kind)
        return [out, lse, *rest]

    return Call(tensors, run, formula, ("out", "lse"), noise)


def layer_norm(dtype: str, rows: int, width: int, rms: bool) -> Call:
    g = torch.Generator().manual_seed(0)
    tensors = {n: _randn(g, dtype, rows, width).requires_grad_() for n in ("x", "residual")}
    tensors["weight"] = (1 + 0.1 * _randn(g, dtype, width)).requires_grad_()
    scalars = norm_call.Scalars((width,), 1e-5, rms, need_sum=True)

    def run(backend: str, x: dict[str, Any]) -> Results:
        return norm_call.run(NormOperands(**x), scalars._replace(backend=backend))

    return Call(tensors, run, lambda x: run("reference", x), ("y", "sum"))


def bias_activation(dtype: str, rows: int, width: int, activation: str, gated: bool) -> Call:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": _randn(g, dtype, rows, width).requires_grad_(),
        "bias": _randn(g, dtype, width).requires_grad_(),
    }
    scalars = activation_call.Scalars(activation, gated)

    def run(backend: str, x: dict[str, Any]) -> Results:
        return (activation_call.run(ActivationOperands(**x), scalars._replace(backend=backend)),)

    return Call(tensors, run, lambda x: run("reference", x), ("y",))


def embedding(dtype: str, length: int, tokens: int, width: int) -> Call:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "tokens": torch.randint(0, tokens, (3, length), generator=g),
        "weight": _randn(g, dtype, tokens, width).requires_grad_(),
        "table": _randn(g, dtype, length + 3, width).requires_grad_(),
    }
    scalars = embedding_call.Scalars(2.0)

    def run(backend: str, x: dict[str, Any]) -> Results:
        return (embedding_call.run(EmbeddingOperands(**x), scalars._replace(backend=backend)),)

    return Call(tensors, run, lambda x: run("reference", x), ("y",))


def linear(dtype: str, rows: int, width: int, width_out: int) -> Call:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": _randn(g, dtype, rows, width).requires_grad_(),
        "weight": (_randn(g, dtype, width_out, width) / width**0.5).requires_grad_(),
        "bias": _randn(g, dtype, width_out).requires_grad_(),
    }

    def run(backend: str, x: dict[str, Any]) -> Results:
        return (linear_call.run(LinearOperands(**x), linear_call.Scalars(backend)),)

    return Call(tensors, run, lambda x: run("reference", x), ("y",))
