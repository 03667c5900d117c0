"""Random calls of bias and activation."""

from __future__ import annotations

from ...ops.bias_activation.api import bias_activation
from ...runtime.activations import ACTIVATIONS
from .built import Built
from .fields import DTYPES, Case, Field, flag, layout
from .tensors import VALUES, Maker

FIELDS = {
    "dtype": Field(DTYPES),
    "values": Field(VALUES, 0.6),
    "rows": Field(([1], [0], [5], [2, 3], [64], [33], [0, 4], [])),
    "width": Field((8, 1, 2, 3, 7, 16, 17, 31, 33, 64, 100, 257, 1000, 4097)),
    "activation": Field(tuple(ACTIVATIONS)),
    "gated": flag(0.4),
    "bias": flag(0.7),
    "dropout_p": Field((0.0, 0.3, 0.9, 1.0), 0.7),
    "lies_x": layout(),
    "gradients": Field(("all", "", "x", "bias"), 0.4),
    "out": flag(0.2),
}


def build(case: Case, device: str) -> Built:
    make = Maker(case["seed"], case["dtype"], device, case["values"])
    width = case["width"] * (2 if case["gated"] else 1)
    tensors = {"x": make.floats((*case["rows"], width), case["lies_x"])}
    if case["bias"]:
        tensors["bias"] = make.floats((width,))
    for name, x in tensors.items():
        if case["gradients"] in ("all", name):
            x.requires_grad_()
    if case["dropout_p"]:
        tensors["dropout_rng"] = make.rng()
    options = {name: case[name] for name in ("activation", "gated", "dropout_p")}
    return Built(bias_activation, tensors, options, takes_out=True)
