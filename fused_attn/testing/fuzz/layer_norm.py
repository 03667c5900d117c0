"""Random calls of the norms."""

from __future__ import annotations

from typing import Any

from ...ops.layer_norm import api
from .built import Built
from .fields import DTYPES, Case, Field, flag, layout
from .tensors import VALUES, Maker

_WIDTHS = (8, 1, 2, 3, 7, 16, 17, 31, 33, 64, 100, 256, 257, 1000, 4097)

FIELDS = {
    "dtype": Field(DTYPES),
    "values": Field(VALUES, 0.6),
    "rms": flag(0.4),
    "add": flag(0.5),
    "rows": Field(([1], [0], [5], [2, 3], [64], [33], [0, 4], [])),
    "width": Field(_WIDTHS),
    "dims": Field((1, 2), 0.8),
    "weight": flag(0.7),
    "bias": flag(0.6),
    "weight_offset": Field((0.0, 1.0, -0.5), 0.7),
    "eps": Field((1e-5, 1e-12, 1.0), 0.7),
    "dropout_p": Field((0.0, 0.3, 0.9), 0.7),
    "return_sum": flag(0.4),
    "lies_x": layout(),
    "lies_residual": layout(),
    "gradients": Field(("all", "", "x", "parameters"), 0.4),
    "out": flag(0.2),
}


def build(case: Case, device: str) -> Built:
    make = Maker(case["seed"], case["dtype"], device, case["values"])
    width = [2, case["width"]] if case["dims"] == 2 else [case["width"]]
    shape = (*case["rows"], *width)
    tensors = {"x": make.floats(shape, case["lies_x"])}
    options: dict[str, Any] = {
        "normalized_shape": tuple(width),
        **{name: case[name] for name in ("eps", "weight_offset")},
    }  # fmt: skip
    if case["add"]:
        tensors["residual"] = make.floats(shape, case["lies_residual"])
        options |= {"dropout_p": case["dropout_p"], "return_sum": case["return_sum"]}
    if case["weight"] or case["weight_offset"]:
        tensors["weight"] = make.floats(width)
    if case["bias"] and not case["rms"]:
        tensors["bias"] = make.floats(width)
    for name, x in tensors.items():
        is_parameter = name in ("weight", "bias")
        if case["gradients"] in ("all", "parameters" if is_parameter else "x"):
            x.requires_grad_()
    if case["add"] and case["dropout_p"]:
        tensors["dropout_rng"] = make.rng()
    names = ("rms_norm", "layer_norm"), ("add_rms_norm", "add_layer_norm")
    function = getattr(api, names[case["add"]][not case["rms"]])
    outputs = ("y", "sum") if case["add"] and case["return_sum"] else ("y",)
    return Built(function, tensors, options, outputs, takes_out=len(outputs) == 1)
