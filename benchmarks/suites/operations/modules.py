"""Modules as problems: ours and torch.nn's, with the same weights."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_attn.convert import fuse

from ..problem import Prepared, Problem, Side
from .attention import MEAN_LENGTH, of_length, padded_lengths

LAYERS = 6  # of a whole encoder (Vaswani et al. 2017; half of BERT-base)
KINDS = ("mha", "layer", "encoder")


@dataclass(frozen=True, kw_only=True)
class Module(Problem):
    """Self-attention of a module over a batch, inference or a training step without optimizer.

    Attributes:
        kind: "mha" (nn.MultiheadAttention), "layer" (nn.TransformerEncoderLayer, GELU, post-norm,
            feed-forward 4 * width) or "encoder" (6 such layers).
        padded: key padding, `mean_length` of the longest on average.
        activation: of the feed-forward, "gelu" or "relu".
        need_weights: averaged attention weights are returned as well ("mha" alone).
        dropout: of training; results are compared without.
    """

    operation: ClassVar[str] = "module"
    bound: ClassVar[str] = "compute"

    kind: str
    batch: int
    seqlen: int
    width: int
    heads: int
    padded: bool = False
    need_weights: bool = False
    dropout: float = 0.1
    layers: int = LAYERS
    mean_length: float = MEAN_LENGTH
    activation: str = "gelu"

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("out", "weights") if self.need_weights else ("out",)

    @property
    def size(self) -> str:
        extras = "" if self.activation == "gelu" else f" {self.activation}"
        extras += " weights" * self.need_weights
        if self.padded:
            extras += f" padding{of_length(self.mean_length)}"
        return f"{self.kind} {self.batch}x{self.seqlen}x{self.width} h{self.heads}{extras}"

    def columns(self) -> dict[str, object]:
        return {
            "batch": self.batch, "heads": self.heads, "heads_kv": self.heads,
            "seqlen_q": self.seqlen, "seqlen_k": self.seqlen, "width": self.width,
            "head_dim": self.width // self.heads,
            "variant": f"{self.kind}{' padding' * self.padded}{' weights' * self.need_weights}",
        }  # fmt: skip

    @property
    def flops(self) -> float:
        """Linears (2 FLOPs a weight and token) and attention (4 Lq Lk width), of real tokens."""
        lengths = self.lengths.tolist() if self.padded else [self.seqlen] * self.batch
        weights = (4 if self.kind == "mha" else 12) * self.width**2
        forward = 2.0 * weights * sum(lengths)
        forward += 4.0 * self.width * sum(length**2 for length in lengths)
        forward *= self.layers if self.kind == "encoder" else 1
        return forward * {"forward": 1.0, "backward": 2.0, "training": 3.0}[self.direction]

    @property
    def lengths(self) -> Tensor:
        return padded_lengths(self.batch, self.seqlen, self.mean_length)

    def tensors(self) -> dict[str, Tensor]:
        """x, the padding, and the parameters by their names."""
        tensors = {"x": self.draw(self.batch, self.seqlen, self.width)}
        if self.padded:
            hidden = torch.arange(self.seqlen) >= self.lengths[:, None]
            tensors["padding"] = hidden.to(self.device)
        parameters = self.stock().named_parameters()
        return tensors | {name: x.detach() for name, x in parameters}

    @property
    def differentiable(self) -> tuple[str, ...]:  # type: ignore[override]
        weights = self._shared().named_parameters()
        return ("x", *(name for name, _ in weights))

    def stock(self, dtype: torch.dtype | None = None) -> nn.Module:
        """torch.nn's module, with the weights that all sides get; training mode if one trains."""
        module = copy.deepcopy(self._shared())
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = self.dropout
            elif isinstance(part, nn.MultiheadAttention):
                part.dropout = self.dropout
        # Weights that the dtype can hold: float64 then starts from the same numbers.
        module = module.to(self.dtype).to(dtype or self.dtype).to(self.device)
        return module.train(self.wants_gradient)

    def _shared(self) -> nn.Module:
        return _stock(self.kind, self.width, self.heads, self.layers, self.activation)

    def fused(self) -> nn.Module:
        """Ours, with the same weights."""
        holder = nn.Sequential(self.stock())
        fuse(holder)
        return holder[0]

    def arguments(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the module's forward."""
        x, padding = tensors["x"], tensors.get("padding")
        if self.kind == "mha":
            keywords = {"need_weights": self.need_weights, "key_padding_mask": padding}
            return (x, x, x), keywords
        return (x,), {"src_key_padding_mask": padding}

    def prepare(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Prepared:
        """One forward of `module`; gradients of x and of every parameter."""
        args, keywords = self.arguments(tensors)
        inputs = {"x": tensors["x"], **dict(module.named_parameters())}
        return Prepared(
            lambda: module(*args, **keywords),
            inputs if self.wants_gradient else {},
            restore=lambda name, x: self.only_real(x) if name == "out" else x,
        )

    def only_real(self, x: Tensor) -> Tensor:
        """0 at padded queries: torch gives numbers there, ours may not compute them."""
        if not self.padded:
            return x
        visible = torch.arange(self.seqlen) < self.lengths[:, None]
        return x * visible.to(x.device, x.dtype)[..., None]

    def output_gradient(self, out: Tensor) -> Tensor:
        return self.only_real(super().output_gradient(out))

    def checked(self) -> Problem:
        """A small batch without dropout: the oracle's gradients of the weights take all of it."""
        return self.replace(batch=min(self.batch, 2), dropout=0.0, layers=min(self.layers, 2))

    def formula(self, **tensors: Tensor) -> Sequence[Tensor | None]:
        module = self.stock(tensors["x"].dtype)
        parameters = {n: x for n, x in tensors.items() if n not in ("x", "padding")}
        args, keywords = self.arguments(tensors)
        with fast_path(False):
            outputs = torch.func.functional_call(module, parameters, args, keywords)
        out, *weights = outputs if isinstance(outputs, tuple) else (outputs,)
        return (self.only_real(out), *weights)

    def ours(self, tensors: dict[str, Tensor]) -> list[Side]:
        return [Side("fused_attn", lambda tensors: self.prepare(self.fused(), tensors))]


@functools.lru_cache(maxsize=4)
def _stock(kind: str, width: int, heads: int, layers: int, activation: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mha":
            return nn.MultiheadAttention(width, heads, batch_first=True)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, activation=activation, batch_first=True
        )
        return layer if kind == "layer" else nn.TransformerEncoder(layer, layers)


@contextlib.contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    """torch.nn's inference fast path, on or off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
