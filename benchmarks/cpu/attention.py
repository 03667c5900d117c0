"""Attention against torch's scaled_dot_product_attention, its flash and its math path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fused_attn
from fused_attn.testing import FORWARD_FACTOR, assert_within_budget

from .row import BF16, FP16, FP32, SHORT_NAMES, Row, Side


@dataclass(frozen=True)
class Attention:
    """One attention problem and how both sides are called."""

    dtype: torch.dtype
    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool = False
    padded: float | None = None  # mean share of the keys that are real
    biased: bool = False
    backward: bool = False
    seqlen_q: int | None = None
    heads_kv: int | None = None

    @property
    def flops(self) -> float:
        rows = self.length if self.seqlen_q is None else self.seqlen_q
        full = 4.0 * self.batch * self.heads * rows * self.length * self.head_dim
        visible = (0.5 if self.causal else 1.0) * (self.padded or 1.0)
        return full * visible * (3.5 if self.backward else 1.0)

    def build(self) -> dict[str, Side]:
        q, k, v = self._tensors()
        masks = self._masks()
        grad = torch.randn_like(q)
        bias, visible = masks.get("bias"), masks.get("key_padding_mask")

        def ours() -> Tensor:
            return fused_attn.attention(q, k, v, causal=self.causal, **masks)

        mask = bias if visible is None else visible[:, None, None, :]

        def theirs(backend: SDPBackend) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with sdpa_kernel(backend):
                    return sdpa(
                        q, k, v, attn_mask=mask, is_causal=self.causal,
                        enable_gqa=self.heads_kv is not None,
                    )  # fmt: skip

            return run

        peers = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
        functions = {"ours": ours, **{name: theirs(backend) for name, backend in peers.items()}}
        if self.backward:
            functions = {n: self._with_backward(f, (q, k, v), grad) for n, f in functions.items()}
        sides = {name: Side(function) for name, function in functions.items()}
        sides["ours"].check = lambda: self._check((q, k, v), masks)
        return sides

    @staticmethod
    def _with_backward(
        function: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor
    ) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(), inputs, grad)

    def _tensors(self) -> list[Tensor]:
        heads_kv = self.heads if self.heads_kv is None else self.heads_kv
        seqlen_q = self.length if self.seqlen_q is None else self.seqlen_q
        shapes = ((self.heads, seqlen_q), (heads_kv, self.length), (heads_kv, self.length))
        return [
            torch.randn(self.batch, heads, length, self.head_dim)
            .to(self.dtype)
            .requires_grad_(self.backward)
            for heads, length in shapes
        ]

    def _masks(self) -> dict[str, Tensor]:
        masks = {}
        if self.padded is not None:
            # Lengths spread evenly about the mean, the longest unpadded.
            spread = torch.linspace(2 * self.padded - 1, 1.0, self.batch)
            lengths = (spread * self.length).round().long()
            masks["key_padding_mask"] = torch.arange(self.length) < lengths[:, None]
        if self.biased:
            masks["bias"] = torch.randn(1, self.heads, self.length, self.length).to(self.dtype)
        return masks

    def _check(self, qkv: tuple[Tensor, ...], masks: dict[str, Tensor]) -> str | None:
        """Hold a head of the problem, and its gradients, against float64."""
        q, k, v = (x.detach()[-1:, :1] for x in qkv)
        some = {n: m[-1:] if n == "key_padding_mask" else m[:, :1] for n, m in masks.items()}
        visible = some.get("key_padding_mask", some.get("bias"))
        mask = visible[:, None, None] if visible is not None and visible.dim() == 2 else visible
        dout = torch.randn_like(q)

        def run(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
            cast = {n: m if m.dtype == torch.bool else m.to(dtype) for n, m in some.items()}

            def function(*inputs: Tensor) -> Tensor:
                return fused_attn.attention(*inputs, causal=self.causal, backend=backend, **cast)

            return self._results(function, [x.to(dtype) for x in (q, k, v)], dout.to(dtype))

        def torchs(*inputs: Tensor) -> Tensor:
            return sdpa(*inputs, attn_mask=mask, is_causal=self.causal)

        with sdpa_kernel(SDPBackend.MATH):
            plain = self._results(torchs, [q, k, v], dout)
        exact = run("reference", torch.float64)
        try:
            for name, ours, theirs, right in zip(
                ("out", "dq", "dk", "dv"), run(None, self.dtype), plain, exact, strict=False
            ):
                assert_within_budget(name, ours, theirs, right, FORWARD_FACTOR)
        except AssertionError as error:
            return str(error)
        return None

    def _results(
        self, function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor
    ) -> list[Tensor]:
        """out, and the gradients of the inputs if the problem has a backward."""
        if not self.backward:
            return [function(*inputs)]
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


# Of the peak of multiply-adds, in the forward without masks.
_SHARES = {
    (FP32, 512): {"share_gate": 0.80},
    (FP32, 2048): {"share_gate": 0.80},
    (BF16, 512): {"share_gate": 0.72},
    (BF16, 2048): {"share_gate": 0.80},
}


def rows() -> list[Row]:
    result = []

    def add(label: str, gate: float, goal: float, *args: Any, **kwargs: Any) -> None:
        problem = Attention(*args, **kwargs)
        size = "x".join(str(n) for n in args[1:5])
        direction = "fwd+bwd" if problem.backward else "fwd"
        name = f"{SHORT_NAMES[problem.dtype]} {direction} {size}{label}"
        share = (
            {} if label or problem.backward else _SHARES.get((problem.dtype, problem.length), {})
        )
        result.append(Row(name, gate, goal, problem.dtype, problem.build, problem.flops, **share))

    for dtype, full, wide, causal512, causal2048, short, short_causal in (
        (FP32, (1.20, 1.35), (1.15, 1.28), (2.0, 2.3), (1.45, 1.7), (1.25, 1.45), (1.6, 1.95)),
        (BF16, (2.3, 2.6), (2.1, 2.45), (3.9, 4.5), (2.8, 3.2), (2.3, 2.8), (3.0, 3.7)),
    ):
        add("", *full, dtype, 2, 8, 512, 64)
        add("", *full, dtype, 1, 8, 2048, 64)
        add("", *wide, dtype, 2, 8, 512, 128)
        add("", *wide, dtype, 1, 8, 2048, 128)
        add(" causal", *causal512, dtype, 2, 8, 512, 64, causal=True)
        add(" causal", *causal2048, dtype, 1, 8, 2048, 64, causal=True)
        add("", *short, dtype, 8, 12, 128, 64)
        add("", *short, dtype, 32, 8, 100, 64)
        add(" causal", *short_causal, dtype, 8, 12, 128, 64, causal=True)
        add(" causal", *short_causal, dtype, 32, 8, 100, 64, causal=True)
    for dtype, padding, bias in (
        (FP32, (1.5, 1.9), (1.2, 1.4)),
        (BF16, (2.8, 3.5), (2.2, 2.6)),
    ):
        add(" padding", *padding, dtype, 8, 8, 512, 64, padded=2 / 3)
        add(" padding", *padding, dtype, 16, 12, 128, 64, padded=2 / 3)
        add(" bias", *bias, dtype, 2, 8, 512, 64, biased=True)
        add(" bias", *bias, dtype, 1, 8, 2048, 64, biased=True)
    add("", 2.3, 3.0, FP16, 8, 12, 128, 64)
    add("", 2.3, 3.0, FP16, 1, 2, 512, 64)
    add("", 5.0, 8.0, FP16, 8, 12, 128, 64, backward=True)
    add(" decode", 2.2, 2.9, FP32, 8, 32, 4096, 128, seqlen_q=1)
    add(" decode", 6.0, 10.0, BF16, 8, 32, 4096, 128, seqlen_q=1)
    for rows_q in (2, 8, 16):
        add(f" Lq={rows_q}", 1.0, 1.3, FP32, 4, 16, 1024, 64, seqlen_q=rows_q)
    for dtype in (BF16, FP16):
        add(" Lq=8", 1.0, 1.3, dtype, 4, 16, 1024, 64, seqlen_q=8)
    for dtype in (FP32, BF16):
        add(" decode grouped 32/8", 1.0, 1.3, dtype, 4, 32, 2048, 128, seqlen_q=1, heads_kv=8)
        add(" Lq=4 grouped 32/8", 1.0, 1.3, dtype, 4, 32, 2048, 128, seqlen_q=4, heads_kv=8)
    add(" grouped 16/4", 1.0, 1.3, FP32, 4, 16, 512, 64, heads_kv=4)
    for dtype, full, long, wide, causal, short in (
        (FP32, (1.25, 1.45), (1.25, 1.45), (1.2, 1.35), (2.2, 2.7), (1.35, 1.7)),
        (BF16, (2.1, 2.5), (1.8, 2.1), (1.8, 2.1), (3.7, 4.5), (3.0, 3.9)),
    ):
        add("", *full, dtype, 2, 8, 512, 64, backward=True)
        add("", *long, dtype, 1, 8, 2048, 64, backward=True)
        add("", *wide, dtype, 1, 8, 2048, 128, backward=True)
        add(" causal", *causal, dtype, 2, 8, 512, 64, causal=True, backward=True)
        add("", *short, dtype, 8, 12, 128, 64, backward=True)
        add("", *short, dtype, 32, 8, 100, 64, backward=True)
    return result
