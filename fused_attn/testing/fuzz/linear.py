"""Random calls of the linear."""

from __future__ import annotations

from ...ops.linear.api import linear
from ...runtime.activations import ACTIVATIONS
from .built import Built
from .fields import DTYPES, Case, Field, flag, layout, maybe
from .tensors import VALUES, Maker

_WIDTHS = (8, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 257)

FIELDS = {
    "dtype": Field(DTYPES),
    "values": Field(VALUES, 0.7),
    "rows": Field(([1], [0], [5], [2, 3], [17], [64], [130], [])),
    "width_in": Field((*_WIDTHS, 0)),
    "width_out": Field((*_WIDTHS, 0)),
    "bias": flag(0.6),
    "activation": maybe(0.5, *ACTIVATIONS),
    "gated": flag(0.3),
    "residual": flag(0.3),
    "dropout_p": Field((0.0, 0.3, 0.9), 0.7),
    "lies_x": layout(),
    "lies_weight": layout(),
    "lies_residual": layout(),
    "gradients": Field(("all", "", "x", "weight", "bias"), 0.4),
}


def build(case: Case, device: str) -> Built:
    make = Maker(case["seed"], case["dtype"], device, case["values"])
    gated = case["gated"] and case["activation"] is not None
    width = case["width_out"] * (2 if gated else 1)
    tensors = {
        "x": make.floats((*case["rows"], case["width_in"]), case["lies_x"]),
        "weight": make.floats((width, case["width_in"]), case["lies_weight"]),
    }
    if case["bias"]:
        tensors["bias"] = make.floats((width,))
    if case["residual"]:
        shape = (*case["rows"], case["width_out"])
        tensors["residual"] = make.floats(shape, case["lies_residual"])
    for name, x in tensors.items():
        if case["gradients"] in ("all", name):
            x.requires_grad_()
    options = {"activation": case["activation"], "gated": gated, "dropout_p": case["dropout_p"]}
    if case["dropout_p"]:
        tensors["dropout_rng"] = make.rng()
    return Built(linear, tensors, options)
