"""Masks beside padding: what is nearly causal must not be packed as if it were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_attn import fuse

E, H, L, N = 16, 2, 7, 4
LENGTHS = (L, 4, 1, 2)
HIDDEN = torch.arange(L)[None] >= torch.tensor(LENGTHS)[:, None]
TRIANGLE = torch.ones(L, L, dtype=torch.bool).triu(1)


def with_hole(i: int, j: int, value: bool) -> torch.Tensor:
    mask = TRIANGLE.clone()
    mask[i, j] = value
    return mask


MASKS = {
    "a hole below the diagonal": with_hole(3, 1, True),
    "a hole in the first column": with_hole(6, 0, True),
    "one key above the diagonal": with_hole(2, 3, False),
    "causal and a window": TRIANGLE | torch.ones(L, L, dtype=torch.bool).tril(-3),
    "a window alone": torch.ones(L, L, dtype=torch.bool).tril(-3),
    "the other triangle": torch.ones(L, L, dtype=torch.bool).tril(-1),
}


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_a_layer_and_a_stack_agree_with_torch(name: str, kind: str, hint: bool) -> None:
    """`is_causal` beside a mask: both apply."""
    mask = MASKS[name]
    layer = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(N, L, E)
    both = mask | TRIANGLE if hint else mask
    sees = (~both & ~HIDDEN[:, None]).any(-1)
    given: torch.Tensor = mask
    if kind == "float":
        given = torch.zeros(L, L).masked_fill(mask, -torch.inf)
    for stock, word in ((layer, "src_mask"), (stack, "mask")):
        ours = copy.deepcopy(stock)
        fuse(ours)
        arguments: dict[str, Any] = {word: given, "is_causal": hint}
        found = ours(x, src_key_padding_mask=HIDDEN, **arguments)
        expected = stock(x, src_key_padding_mask=HIDDEN, **{word: both})
        real = ~HIDDEN & sees  # torch has NaN where a query sees nothing
        if stock is stack:  # whose second layer spreads that
            real &= sees.all(1, keepdim=True)
        assert real.any()
        torch.testing.assert_close(found[real], expected[real])
        assert found.isfinite().all()
        assert (found[HIDDEN] == 0).all()


CHILDREN = (
    "self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2",
)  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("child", CHILDREN)
def test_a_hook_on_one_child_alone_is_obeyed(child: str, training: bool) -> None:
    """It subtracts the mean over positions: packed, it would mix sentences."""

    def centred(module: nn.Module, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        x = x - x.mean(1, keepdim=True)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    stock = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True).train(training)
    ours = copy.deepcopy(stock)
    fuse(ours)
    for model in (stock, ours):
        model.get_submodule(child).register_forward_hook(centred)
    x = torch.randn(N, L, E)
    expected, found = (model(x, src_key_padding_mask=HIDDEN) for model in (stock, ours))
    torch.testing.assert_close(found[~HIDDEN], expected[~HIDDEN])
