"""Random modules: fused ones against those of torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...convert import fuse
from ..parity import assert_parity
from .fields import DTYPES, Case, Field, flag, maybe
from .tensors import Maker

FIELDS = {
    "dtype": Field(DTYPES[:2], 0.6),
    "module": Field(("attention", "encoder layer", "decoder layer", "encoder")),
    "batch": Field((1, 2, 3)),
    "length": Field((2, 3, 7, 16, 17, 33)),
    "memory": Field((1, 3, 9, 20)),
    "heads": Field((1, 2, 3)),
    "head_dim": Field((8, 5, 16, 20)),
    "batch_first": flag(0.7),
    "norm_first": flag(0.4),
    "bias": Field((True, False), 0.7),
    "activation": Field(("relu", "gelu"), 0.5),
    "padding": flag(0.5),
    "causal": flag(0.4),
    "float_mask": flag(0.4),
    "linears": flag(0.5),
    "weights": maybe(0.4, "average", "per head"),
    "training": flag(0.5),
}


def check(case: Case, draws: int) -> None:
    """One module against torch's.

    Raises:
        AssertionError: an output or gradient is over the budget.
    """
    torch.manual_seed(case["seed"])
    model = _module(case).to(getattr(torch, case["dtype"])).train(case["training"])
    fused = copy.deepcopy(model)
    fuse(fused, linears=case["linears"])
    parts: Any = fused.modules()
    for part in parts:
        if hasattr(part, "pack_padding"):
            part.pack_padding = False  # numbers at padding are compared too
    fused = fused.train(case["training"])
    assert_parity(model, fused, _inputs(case), draws=draws)


def _module(case: Case) -> nn.Module:
    width = case["heads"] * case["head_dim"]
    if case["module"] == "attention":
        return nn.MultiheadAttention(
            width, case["heads"], bias=case["bias"], batch_first=case["batch_first"]
        )
    settings: dict[str, Any] = {
        "d_model": width, "nhead": case["heads"], "dim_feedforward": 2 * width + 3, "dropout": 0.0,
        **{name: case[name] for name in ("batch_first", "norm_first", "bias")},
        # In 16 bits it is luck which units near 0 a ReLU keeps; many layers together are compared
        # in tests/modules/test_sixteen_bit_layers.py.
        "activation": case["activation"] if case["dtype"] == "float32" else "gelu",
    }  # fmt: skip
    if case["module"] == "decoder layer":
        return nn.TransformerDecoderLayer(**settings)
    layer = nn.TransformerEncoderLayer(**settings)
    if case["module"] == "encoder layer":
        return layer
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _inputs(case: Case) -> dict[str, Any]:
    make = Maker(case["seed"], case["dtype"], "cpu")
    width, batch, length = case["heads"] * case["head_dim"], case["batch"], case["length"]

    def rows(length: int) -> torch.Tensor:
        x = make.floats((batch, length, width))
        return x if case["batch_first"] else x.transpose(0, 1)

    # The first key is always there: torch has NaN where a query sees nothing.
    hidden = torch.arange(length)[None] >= make.integers(1, length + 1, (batch,))[:, None]
    mask: torch.Tensor = torch.ones(length, length, dtype=torch.bool).triu(1)
    if case["float_mask"]:
        mask = torch.zeros(length, length).masked_fill(mask, -torch.inf).to(make.dtype)
        hidden = torch.zeros(batch, length).masked_fill(hidden, -torch.inf).to(make.dtype)
    x = rows(length)
    if case["module"] == "attention":
        given: dict[str, Any] = {"query": x, "key": x, "value": x}
        names = "key_padding_mask", "attn_mask"
        given["need_weights"] = case["weights"] is not None
        given["average_attn_weights"] = case["weights"] == "average"
    elif case["module"] == "decoder layer":
        given = {"tgt": x, "memory": rows(case["memory"])}
        names = "tgt_key_padding_mask", "tgt_mask"
    else:
        given = {"src": x}
        names = "src_key_padding_mask", "mask" if case["module"] == "encoder" else "src_mask"
    given[names[0]] = hidden if case["padding"] else None
    given[names[1]] = mask if case["causal"] else None
    return given
