"""`is_causal` of FusedMultiheadAttention: one meaning in every mode, no look into the mask.

torch.nn raises without a mask in training, ignores the hint in inference, drops the mask or the
hint depending on other arguments, and hides the appended keys.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.cases.mha import Call, E, H, L, N, S, check, formula, pair

pytestmark = pytest.mark.usefixtures("one_thread")

APPENDED = [{}, {"add_bias_kv": True}, {"add_zero_attn": True}]
APPENDED.append({"add_bias_kv": True, "add_zero_attn": True})


def triangle(queries: int, keys: int) -> Tensor:
    """True = masked out."""
    return torch.ones(queries, keys, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("module", APPENDED)
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_without_a_mask_it_is_the_causal_mask(
    module: dict[str, bool], padding: str | None, need_weights: bool
) -> None:
    call = Call(module=module, self_attention=True, padding=padding, is_causal=True)
    check(call, need_weights=need_weights)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "need_weights", "not batch_first"])
@pytest.mark.parametrize("mask", [None, "causal", "other"])
def test_is_the_same_in_every_mode(mode: str, mask: str | None) -> None:
    _, ours = pair(E, H, batch_first=mode != "not batch_first")
    x = torch.randn(N, L, E)
    attn_mask = {None: None, "causal": triangle(L, L), "other": torch.rand(L, L) < 0.3}[mask]
    expected, _ = formula(ours, x, x, x, attn_mask=attn_mask, is_causal=True)
    if mode == "not batch_first":
        x, expected = x.transpose(0, 1), expected.transpose(0, 1)
    ours.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        out, _ = ours(
            x, x, x, attn_mask=attn_mask, is_causal=True, need_weights=mode == "need_weights"
        )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_right_hint_beside_the_causal_mask_changes_nothing(need_weights: bool) -> None:
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    for mask in (triangle(L, L), nn.Transformer.generate_square_subsequent_mask(L)):
        hinted = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)[0]
        plain = ours(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        torch.testing.assert_close(hinted, plain)


@pytest.mark.parametrize("module", APPENDED[1:])
def test_appended_keys_stay_visible(module: dict[str, bool]) -> None:
    """torch.nn's hint hides them: its result differs from that of the mask it hints at."""
    _, ours = pair(E, H, batch_first=True, **module)
    x = torch.randn(N, L, E)
    _, weights = ours(x, x, x, is_causal=True)
    appended = len(module)
    assert (weights[..., L:] > 0).all()
    assert torch.equal(weights[..., :L] > 0, ~triangle(L, L).expand(N, L, L))
    assert weights.shape[-1] == L + appended


@pytest.mark.parametrize("module", APPENDED)
def test_cross_attention_without_a_mask_aligns_the_first_query_and_key(
    module: dict[str, bool],
) -> None:
    _, ours = pair(E, H, batch_first=True, **module)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    expected, _ = formula(ours, query, key, key, attn_mask=triangle(L, S))
    torch.testing.assert_close(ours(query, key, key, is_causal=True)[0], expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_attention_with_a_mask_obeys_the_mask_alone(need_weights: bool) -> None:
    """A lower-right causal mask, as decoding with a cache has it, is causal too."""
    _, ours = pair(E, H, batch_first=True)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    lower_right = torch.ones(L, S, dtype=torch.bool).triu(1 + S - L)
    expected, _ = formula(ours, query, key, key, attn_mask=lower_right)
    out, _ = ours(query, key, key, attn_mask=lower_right, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
