"""Random calls of attention, packed ones too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.attention.api import attention, attention_varlen
from ..budget import attention_noise
from .built import Built
from .fields import DTYPES, LENGTHS, Case, Field, flag, layout, maybe
from .tensors import VALUES, Maker

_WIDTHS = (8, 1, 3, 16, 20, 32, 33, 64, 80, 128)
_BROADCAST = tuple(a + b + c + d for a in "1b" for b in "1h" for c in "q1" for d in "k1")

FIELDS = {
    "dtype": Field(DTYPES),
    "values": Field(VALUES, 0.7),
    "packed": flag(0.2),
    "batch": Field((1, 0, 2, 3), 0.2),
    "heads_kv": Field((1, 2, 3), 0.4),
    "group": Field((1, 2, 4), 0.6),
    "seqlen_q": Field(LENGTHS),
    "seqlen_k": maybe(0.6, *LENGTHS),  # None: as seqlen_q
    "head_dim": Field(_WIDTHS),
    "head_dim_v": maybe(0.3, *_WIDTHS),
    "causal": Field((False, True, "lower_right"), 0.5),
    "window": maybe(0.2, [5, 5], [40, 0], [-1, 3], [0, -1], [100, 20]),
    "chunk": maybe(0.1, 1, 16, 50),
    "padding": maybe(0.3, "mask", "lengths", "holes", "empty"),
    "mask": maybe(0.25, *_BROADCAST),
    "density": Field((0.7, 0.05, 0.3, 1.0), 0.5),
    "mask_tile": maybe(0.5, 16, 64),
    "bias": maybe(0.25, *_BROADCAST),
    "bias_dtype": maybe(0.2, "float32"),
    "alibi": flag(0.15),
    "sinks": flag(0.15),
    "documents": maybe(0.15, "runs", "mixed"),
    "prefix": flag(0.1),
    "softcap": maybe(0.15, 1.0, 20.0),
    "scale": maybe(0.2, 0.3, -0.2, 0.0),
    "dropout_p": Field((0.0, 0.2, 0.7, 1.0), 0.7),
    "weights": maybe(0.2, "average", "per_head"),
    "layout": Field(("bhld", "blhd"), 0.7),
    "lies_q": layout(),
    "lies_k": layout(),
    "lies_v": layout(),
    "nan_in_padding": flag(0.5),
    "gradients": Field(("qkv", "", "q", "kv", "v", "all"), 0.3),
    "out": flag(0.2),
}


def build(case: Case, device: str) -> Built:
    make = Maker(case["seed"], case["dtype"], device, case["values"])
    return _packed(case, make) if case["packed"] else _dense(case, make)


def _dense(case: Case, make: Maker) -> Built:
    batch, heads, heads_kv, seqlen_q, seqlen_k = sizes(case)
    width = case["head_dim"]
    width_v = width if case["head_dim_v"] is None else case["head_dim_v"]
    rows = case["layout"] == "blhd"

    def made(heads: int, length: int, width: int, lies: str) -> Tensor:
        shape = (batch, length, heads, width) if rows else (batch, heads, length, width)
        return make.floats(shape, lies)

    tensors = {
        "q": made(heads, seqlen_q, width, case["lies_q"]),
        "k": made(heads_kv, seqlen_k, width, case["lies_k"]),
        "v": made(heads_kv, seqlen_k, width_v, case["lies_v"]),
    }
    hidden = _padding(case, make, tensors, batch, seqlen_k)
    if case["nan_in_padding"] and hidden is not None:
        for name in ("k", "v"):  # nobody looks there
            at = hidden[:, :, None, None] if rows else hidden[:, None, :, None]
            tensors[name] = torch.where(at, torch.nan, tensors[name])
    _scores(case, make, tensors, (batch, heads, seqlen_q, seqlen_k))
    pairs: tuple[str, ...] = ()
    if case["documents"] is not None:
        pairs = ("document_ids",)
        for n, length in enumerate((seqlen_q, seqlen_k)):
            ids = make.integers(0, 3, (batch, length))
            tensors[f"document_ids {n}"] = (
                ids.sort(-1).values if case["documents"] == "runs" else ids
            )
    if case["prefix"] and (case["causal"] or case["window"] is not None):
        tensors["prefix_lengths"] = make.integers(0, seqlen_k + 1, (batch,))
    options = {**_options(case), "return_lse": True, "layout": case["layout"]}
    options["return_weights"] = case["weights"]
    _require(case, tensors)
    outputs = ("out", "lse", "weights")
    return Built(
        attention, tensors, options, outputs, attention_noise, case["weights"] is None and not rows,
        pairs, _heads_first if rows else None,
    )  # fmt: skip


def _heads_first(results: list[Tensor]) -> list[Tensor]:
    return [results[0].transpose(1, 2), *results[1:]]


def _one_batch(results: list[Tensor]) -> list[Tensor]:
    out, lse = results
    return [out.transpose(0, 1)[None], lse[None]]


def _packed(case: Case, make: Maker) -> Built:
    """Sequences one after the other, empty ones too, and rows that belong to none."""
    batch, heads, heads_kv, longest_q, longest_k = sizes(case)
    width = case["head_dim"]
    width_v = width if case["head_dim_v"] is None else case["head_dim_v"]
    lengths = [
        make.integers(0, longest + 1, (batch,)) if n else None
        for n, longest in ((batch, longest_q), (batch, longest_k))
    ]
    starts = [
        torch.zeros(1 if x is None else batch + 1, dtype=torch.int32, device=make.device)
        for x in lengths
    ]
    for start, x in zip(starts, lengths, strict=True):
        if x is not None:
            start[1:] = x.cumsum(0)
    total_q, total_k = (int(start[-1]) + 2 for start in starts)
    tensors = {
        "q": make.floats((total_q, heads, width), case["lies_q"]),
        "k": make.floats((total_k, heads_kv, width), case["lies_k"]),
        "v": make.floats((total_k, heads_kv, width_v), case["lies_v"]),
    }
    _scores(case, make, tensors, (batch, heads, longest_q, longest_k))
    tensors |= {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    if case["prefix"] and (case["causal"] or case["window"] is not None):
        tensors["prefix_lengths"] = make.integers(0, longest_k + 1, (batch,))
    options = {**_options(case), "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    _require(case, tensors)
    options["return_lse"] = True
    return Built(
        attention_varlen, tensors, options, ("out", "lse", "weights"), attention_noise,
        arrange=_one_batch,
    )  # fmt: skip


def sizes(case: Case) -> tuple[int, int, int, int, int]:
    """B, H, Hkv, Lq, Lk."""
    seqlen_k = case["seqlen_q"] if case["seqlen_k"] is None else case["seqlen_k"]
    heads_kv = case["heads_kv"]
    return case["batch"], heads_kv * case["group"], heads_kv, case["seqlen_q"], seqlen_k


def _padding(
    case: Case, make: Maker, tensors: dict[str, Tensor], batch: int, seqlen_k: int
) -> Tensor | None:
    """Adds a padding to the operands; True where a key is hidden by it, (B, Lk)."""
    kind = case["padding"]
    if kind is None:
        return None
    lengths = make.integers(0, seqlen_k + 1, (batch,))
    if kind == "empty" and batch > 0:
        lengths[0] = 0
    seen = torch.arange(seqlen_k, device=make.device)[None] < lengths[:, None]
    if kind == "holes":
        seen = seen & make.bools((batch, seqlen_k), 0.7)
    if kind == "lengths":
        tensors["key_lengths"] = lengths
    else:
        tensors["key_padding_mask"] = seen
    return ~seen


def _scores(
    case: Case, make: Maker, tensors: dict[str, Tensor], full: tuple[int, int, int, int]
) -> None:
    """Adds what is added to scores, or hides some."""

    def shape(text: str) -> tuple[int, ...]:
        return tuple(1 if letter == "1" else n for letter, n in zip(text, full, strict=True))

    if case["mask"] is not None:
        tensors["mask"] = make.bools(shape(case["mask"]), case["density"], case["mask_tile"])
    if case["bias"] is not None:
        dtype = None if case["bias_dtype"] is None else getattr(torch, case["bias_dtype"])
        if make.dtype == torch.float64:
            dtype = None
        tensors["bias"] = make.floats(shape(case["bias"]), dtype=dtype)
    if case["alibi"]:
        tensors["alibi_slopes"] = make.floats((full[1],), dtype=torch.float32).abs()
    if case["sinks"]:
        tensors["sinks"] = make.floats((full[1],), dtype=torch.float32)
    if case["dropout_p"]:
        tensors["dropout_rng"] = make.rng()


def _options(case: Case) -> dict[str, Any]:
    window = None if case["window"] is None else tuple(case["window"])
    names = ("causal", "softcap", "scale", "dropout_p", "chunk")
    return {**{name: case[name] for name in names}, "window": window}


def _require(case: Case, tensors: dict[str, Tensor]) -> None:
    """Marks the tensors whose gradients are wanted."""
    wanted = case["gradients"]
    for name, x in tensors.items():
        if x.is_floating_point() and (wanted == "all" or name in wanted):
            x.requires_grad_()
