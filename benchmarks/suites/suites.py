"""The suites: which problems, at which shapes. `SUITES` is the registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import shapes
from .operations.attention import VARIANTS, Attention, TinyCall
from .operations.bias_activation import BiasActivation
from .operations.embedding import Embedding
from .operations.importing import Import
from .operations.layer_norm import AddNorm
from .operations.linear import Linear
from .operations.modules import KINDS, Module
from .operations.packed import Packed
from .problem import DTYPES, Problem
from .shapes import ShapeKind, Sizes

Build = Callable[..., Problem]


@dataclass(frozen=True)
class Suite:
    """A family of problems.

    Attributes:
        build: a problem of sizes, a variant and the keywords dtype, device and direction.
        variants: all that a shape may ask for.
        directions: measured for every shape.
        cuda, cpu, quick, toy: sets of shapes that are measured where none is asked for; quick is
            that of `--quick`, on the CPU and on a GPU.
        usual: the variants that are measured unless a shape names one; all if empty.
        quick_usual: the same for `--quick`; `usual` if empty.
        dtypes: whether a dtype means anything to it.
        launches: on a GPU the wall time of a call is what counts, not the device's.
    """

    name: str
    description: str
    kind: ShapeKind
    build: Build
    directions: tuple[str, ...]
    cuda: tuple[str, ...]
    cpu: tuple[str, ...] = ("cpu",)
    quick: tuple[str, ...] = ("quick",)
    toy: tuple[str, ...] = ("toy",)
    variants: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    quick_usual: tuple[str, ...] = ()
    dtypes: bool = True
    launches: bool = False

    def problems(
        self,
        device: str,
        dtypes: Sequence[torch.dtype] = (),
        wanted: Sequence[str] = (),
        quick: bool = False,
    ) -> list[Problem]:
        """Every case of the suite.

        Args:
            dtypes: bf16 on a GPU, fp32 and bf16 on the CPU if empty.
            wanted: shapes as `shapes.parse` reads them; the usual ones if empty.

        Raises:
            ShapeError: a shape cannot be read.
        """
        usual = self.quick if quick else self.cuda if device == "cuda" else self.cpu
        default = [DTYPES["bf16"]] if device == "cuda" else [DTYPES["fp32"], DTYPES["bf16"]]
        if not self.dtypes:
            default = dtypes = [DTYPES["fp32"]]
        problems: dict[Problem, None] = {}  # a shape that two sets have is measured once
        for sizes, variant in self._cases(wanted or usual, quick):
            for dtype in dtypes or default:
                for direction in self.directions:
                    problem = self.build(
                        sizes, variant, dtype=dtype, device=device, direction=direction
                    )
                    problems[problem] = None
        return list(problems)

    def problem(
        self, shape: str, variant: str, dtype: torch.dtype, direction: str, **facts: Any
    ) -> Problem:
        """One case on the CPU; `shape` is one of numbers, `facts` are other fields of it."""
        [sizes], _ = shapes.parse(self.kind, shape, self.variants)
        return self.build(sizes, variant, dtype=dtype, device="cpu", direction=direction, **facts)

    def _cases(self, wanted: Sequence[str], quick: bool) -> list[tuple[Sizes, str]]:
        usual = (quick and self.quick_usual) or self.usual or self.variants or ("",)
        cases = []
        for text in wanted:
            sizes, variant = shapes.parse(self.kind, text, self.variants)
            cases += [(s, v) for s in sizes for v in ((variant,) if variant else usual)]
        return cases


def _attention(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    return _attention_of(Attention, sizes, variant, **facts)


def _attention_of(kind: type[Attention], sizes: Sizes, variant: str, **facts: Any) -> Problem:
    b, h, hkv, lq, lk, d = sizes
    return kind(
        batch=b, heads=h, heads_kv=hkv, seqlen_q=lq, seqlen_k=lk, head_dim=d,
        variant=variant or "full", **facts,
    )  # fmt: skip


def _call(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    return _attention_of(TinyCall, sizes, variant, **facts)


def _packed(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    b, h, hkv, length, d = sizes
    return Packed(
        batch=b, heads=h, heads_kv=hkv, seqlen=length, head_dim=d, variant=variant, **facts
    )


def _norm(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    return AddNorm(rows=sizes[0], width=sizes[1], variant=variant, **facts)


def _activation(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    return BiasActivation(rows=sizes[0], width=sizes[1], variant=variant, **facts)


def _linear(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    rows, width, width_out = sizes
    return Linear(rows=rows, width=width, width_out=width_out, **facts)


def _embedding(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    b, length, vocabulary, width = sizes
    return Embedding(batch=b, seqlen=length, vocabulary=vocabulary, width=width, **facts)


def _module(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    b, length, width, heads = sizes
    kind, _, extra = variant.partition("-")
    return Module(
        kind=kind, batch=b, seqlen=length, width=width, heads=heads, padded=extra == "padded",
        need_weights=extra == "weights", **facts,
    )  # fmt: skip


def _import(sizes: Sizes, variant: str, **facts: Any) -> Problem:
    return Import(**facts)


MODULE_VARIANTS = tuple(f"{kind}{extra}" for kind in KINDS for extra in ("", "-padded"))
FORWARD, BACKWARD = ("forward",), ("backward",)

SUITES = (
    Suite("forward", "attention forward", shapes.ATTENTION, _attention, FORWARD,
          ("tokens-16k", "b4h48", "grouped", "small"), variants=VARIANTS,
          usual=("full", "causal")),
    Suite("backward", "attention backward, alone", shapes.ATTENTION, _attention, BACKWARD,
          ("tokens-16k", "b4h48", "grouped"), variants=VARIANTS, usual=("full", "causal")),
    Suite("masks", "attention with padding, mask, bias, ALiBi, window or softcap, both directions",
          shapes.ATTENTION, _attention, ("forward", "training"), ("bert-base", "b4h48"),
          quick=("8,12,12,128,128,64",), cpu=("8,8,8,512,512,64", "16,12,12,128,128,64"),
          variants=VARIANTS, usual=VARIANTS[2:], quick_usual=("padding", "bias")),
    Suite("weights", "nn.MultiheadAttention with need_weights=True", shapes.MODULES, _module,
          FORWARD, ("d512-1024",), cpu=("16,128,512,8", "1,2048,512,8"), quick=("4,128,512,8",),
          variants=("mha-weights",)),
    Suite("packed", "packed batches, mean length 0.6 of the longest", shapes.PACKED, _packed,
          ("forward", "training"), ("bert-base", "tokens-16k"), variants=("full", "causal"),
          quick_usual=("full",)),
    Suite("decode", "one query (or a few) against many keys", shapes.ATTENTION, _attention,
          FORWARD, ("decode",), ("cpu-decode",), ("quick-decode",), ("toy-decode",),
          variants=VARIANTS, usual=("full",)),
    Suite("layer_norm", "residual + LayerNorm or RMSNorm", shapes.ROWS, _norm,
          ("forward", "backward"), ("64m",), variants=("layer", "rms"), quick_usual=("layer",)),
    Suite("bias_activation", "bias + GELU, and SwiGLU", shapes.ROWS, _activation,
          ("forward", "training"), ("64m",), quick=("2048,3072",), variants=("gelu", "swiglu")),
    Suite("linear", "x W^T + bias", shapes.PRODUCTS, _linear, ("forward", "training"),
          ("d512-1024",)),
    Suite("embedding", "token embedding + positions", shapes.TOKENS, _embedding,
          ("forward", "training"), ("bert-base",)),
    Suite("modules", "attention, encoder layer and encoder of torch.nn, inference and training",
          shapes.MODULES, _module, ("forward", "training"), ("d512-1024", "bert-base"),
          quick=("4,128,256,4",), variants=MODULE_VARIANTS,
          quick_usual=("mha", "layer-padded", "encoder")),
    Suite("overhead", "what a call costs with nothing to compute", shapes.ATTENTION, _call,
          ("forward", "training"), ("call",), ("call",), ("call",), ("call",),
          variants=("full",), launches=True),
    Suite("import", "import time, after torch", shapes.NONE, _import, FORWARD, ("process",),
          ("process",), ("process",), ("process",), dtypes=False),
)  # fmt: skip


def find(name: str) -> Suite:
    """The suite called `name`; KeyError if there is none."""
    return {suite.name: suite for suite in SUITES}[name]
