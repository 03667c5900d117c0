"""Random calls of the embedding."""

from __future__ import annotations

from typing import Any

import torch

from ...ops.embedding.api import embedding
from ..budget import gradients
from .built import Built
from .fields import DTYPES, Case, Field, flag, layout, maybe
from .tensors import VALUES, Maker

FIELDS = {
    "dtype": Field(DTYPES),
    "values": Field(VALUES, 0.6),
    "batch": Field((1, 0, 2, 5)),
    "length": Field((1, 0, 2, 7, 33, 64)),
    "vocabulary": Field((4, 1, 100)),
    "width": Field((8, 1, 2, 3, 7, 16, 17, 33, 64, 257, 1000)),
    "table": flag(0.5),
    "positions": flag(0.3),
    "offset": Field((0, 3), 0.7),
    "scale": Field((1.0, 5.5, -0.25), 0.5),
    "padding_idx": maybe(0.3, 0),
    "dropout_p": Field((0.0, 0.3, 0.9), 0.7),
    "tokens": Field(("int64", "int32"), 0.7),
    "lies_weight": layout(),
    "gradients": Field(("all", "", "weight", "table"), 0.4),
}


def build(case: Case, device: str) -> Built:
    make = Maker(case["seed"], case["dtype"], device, case["values"])
    shape = case["batch"], case["length"]
    tokens = make.integers(0, case["vocabulary"], shape).to(getattr(torch, case["tokens"]))
    tensors = {
        "tokens": tokens,
        "weight": make.floats((case["vocabulary"], case["width"]), case["lies_weight"]),
    }
    options = {name: case[name] for name in ("scale", "padding_idx", "dropout_p")}
    if case["table"]:
        rows = case["length"] + 5
        tensors["table"] = make.floats((rows, case["width"]))
        if case["positions"]:
            tensors["positions"] = make.integers(0, rows, shape)
        else:
            options["offset"] = case["offset"]
    for name in ("weight", "table"):
        if name in tensors and case["gradients"] in ("all", name):
            tensors[name].requires_grad_()
    if case["dropout_p"]:
        tensors["dropout_rng"] = make.rng()
    return Built(embedding, tensors, options, noise=_noise)


def _noise(outputs: Any, inputs: Any, dtype: torch.dtype) -> list[float]:
    """What the additions of a row's gradient, one for each of its tokens, come to in float64.

    The yardstick, plain PyTorch in float32, is often exact there: its numbers have few bits.
    """
    if dtype != torch.float64:
        return [0.0] * (1 + len(inputs))
    additions = outputs[0].numel() // max(1, outputs[0].shape[-1])
    found = gradients(outputs, inputs)
    largest = [float(g.abs().max()) if g.numel() else 0.0 for g in found]
    return [0.0, *(additions * torch.finfo(dtype).eps / 2 * size for size in largest)]
