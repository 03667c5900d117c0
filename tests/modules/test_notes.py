"""What modules say of how they run, to `fused_attn.explain`; and nothing where nobody asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn import (
    FusedFeedForward,
    FusedTransformer,
    FusedTransformerDecoderLayer,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
    explain,
)
from fused_attn.modules.packable import PackableLayer
from tests.cases.packed import FF, E, H, L, N, padding

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*environ"),
]

HIDDEN = padding([L, 4, 1, 2])
HOLES = torch.eye(N, L, dtype=torch.bool)
X = torch.zeros(N, L, E)


def layer(**settings: Any) -> FusedTransformerEncoderLayer:
    return FusedTransformerEncoderLayer(E, H, FF, 0.0, **{"batch_first": True, **settings})


def notes(module: nn.Module, *inputs: Any, **arguments: Any) -> list[str]:
    return list(explain(module, *inputs, **arguments).notes)


def test_packed_and_how_much_of_it_is_real() -> None:
    assert "FusedTransformerEncoderLayer packed: 14 of 28 positions are real" in notes(
        layer(), X, None, HIDDEN
    )
    stack = FusedTransformerEncoder(layer(), 2, enable_nested_tensor=False)
    said = [note for note in notes(stack, X, src_key_padding_mask=HIDDEN) if "packed" in note]
    assert said == ["FusedTransformerEncoder packed: 14 of 28 positions are real"]


def test_the_memory_of_a_decoder_too() -> None:
    ours = FusedTransformerDecoderLayer(E, H, FF, 0.0, batch_first=True)
    said = notes(ours, X, X, memory_key_padding_mask=HIDDEN)[0]
    assert said.endswith("packed: 28 of 28 positions are real, 14 of 28 of the memory")


WHY: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({}, "no padding mask"),
    "no padding": ({"src_key_padding_mask": HIDDEN & False}, "no position is padding"),
    "holes": ({"src_key_padding_mask": HOLES}, "padding lies elsewhere than at the ends"),
    "floating": (
        {"src_key_padding_mask": torch.zeros(N, L)}, "the padding mask is not bool"),
    "another mask": (
        {"src_key_padding_mask": HIDDEN, "src_mask": torch.ones(L, L).tril(1) == 0},
        "the attention mask is neither causal nor none"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHY)
def test_not_packed_and_why(name: str) -> None:
    arguments, why = WHY[name]
    assert notes(layer(), X, **arguments)[0] == f"FusedTransformerEncoderLayer not packed: {why}"


def test_not_packed_because_of_what_is_in_it() -> None:
    ours = layer()
    ours.pack_padding = False
    assert notes(ours, X, None, HIDDEN)[0].endswith("not packed: `pack_padding` is False")
    ours = layer()
    ours.linear1.register_forward_hook(lambda *_: None)
    assert notes(ours, X, None, HIDDEN)[0].endswith("not packed: a hook on `linear1`")
    ours = layer()
    ours.register_forward_hook(lambda *_: None)
    assert notes(ours, X, None, HIDDEN)[0].endswith("not packed: a hook on the layer")
    ours = layer()
    ours.self_attn.add_zero_attn = True
    assert "`self_attn` appends keys" in notes(ours, X, None, HIDDEN)[0]
    stack = FusedTransformerEncoder(layer(), 2, enable_nested_tensor=False)
    stack.layers[1] = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    said = notes(stack, X, src_key_padding_mask=HIDDEN)[0]
    assert said == ("FusedTransformerEncoder not packed: `layers.1` is a TransformerEncoderLayer")


def test_subclasses_of_our_layers_say_so() -> None:
    class Own(FusedTransformerEncoderLayer):
        pass

    ours = Own(E, H, FF, 0.0, batch_first=True)
    assert notes(ours, X, None, HIDDEN)[0] == "Own not packed: it is a Own"


def test_not_packed_where_shapes_cannot_depend_on_data() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer(), backend="eager")
    said = [note for note in notes(compiled, X, None, HIDDEN) if "packed" in note]
    assert said == [
        "FusedTransformerEncoderLayer not packed: compiled: shapes cannot depend on data"
    ]
    on_meta = layer().to("meta")
    assert notes(on_meta, X.to("meta"), None, HIDDEN.to("meta"))[0].endswith("hold no data")


@pytest.mark.parametrize("hooked", [False, True])
def test_nested(hooked: bool) -> None:
    ours = layer()
    if hooked:
        ours.norm1.register_forward_hook(lambda *_: None)
    x = torch.nested.as_nested_tensor([X[0, :3], X[1]], layout=torch.jagged)
    start = "not packed: the NestedTensor is padded" if hooked else "packed: as the NestedTensor is"
    assert notes(ours, x)[0] == f"FusedTransformerEncoderLayer {start}"


def feed_forward_note(module: nn.Module, x: Tensor) -> str:
    [note] = [note for note in notes(module, x) if note.startswith("feed-forward: ")]
    return note.removeprefix("feed-forward: ")


def test_feed_forward_says_where_the_bias_is() -> None:
    ours, x = FusedFeedForward(E, FF, 0.0, "gelu"), torch.zeros(3, E)
    assert feed_forward_note(ours, x) == "bias after the product; gelu and dropout in one pass"
    ours.to(torch.bfloat16)
    assert feed_forward_note(ours, x.bfloat16()) == (
        "the product has the bias, if any; gelu and dropout in one pass"
    )
    ours.linear1.register_forward_hook(lambda *_: None)
    assert feed_forward_note(ours, x.bfloat16()) == (
        "one sub-module after the other, since a hook on `linear1`"
    )
    assert "since the activation" in feed_forward_note(layer(activation=torch.tanh), X)


def test_nothing_is_said_and_no_reason_sought_where_nobody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("a reason was sought")

    model = FusedTransformer(E, H, 1, 1, FF, 0.0, batch_first=True)
    model.encoder.layers[0].norm1.register_forward_hook(lambda *_: None)
    model.decoder.layers[0].norm1.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(PackableLayer, "why_not_packable", fail)
    masks = {"src_key_padding_mask": HIDDEN, "tgt_key_padding_mask": HIDDEN}
    model(X, X, **masks)
    with pytest.raises(AssertionError, match="a reason was sought"):
        explain(model, X, X, **masks)
