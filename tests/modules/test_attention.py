"""FusedMultiheadAttention computes what torch.nn.MultiheadAttention computes: values, gradients.

Both are held against a float64 oracle (mha_cases.formula); ours may be off by twice torch's error
(three times for gradients) plus one rounding step.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import nn

from fused_attn import FusedMultiheadAttention
from fused_attn.testing import assert_within_budget
from tests.cases.mha import Call, E, H, L, N, S, check, formula, pair

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {
    "default": {},
    "kdim": {"kdim": 6},
    "vdim": {"vdim": 5},
    "kdim and vdim": {"kdim": 6, "vdim": 5},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "bias_kv, no bias": {"add_bias_kv": True, "bias": False},
    "zero_attn": {"add_zero_attn": True},
    "all": {"kdim": 6, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
}


def test_constructor_has_torch_names_order_and_defaults() -> None:
    theirs = inspect.signature(nn.MultiheadAttention.__init__).parameters.values()
    *ours, extra = inspect.signature(FusedMultiheadAttention.__init__).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert (extra.name, extra.default, extra.kind) == ("rotary_base", None, extra.KEYWORD_ONLY)


def test_forward_has_torch_names_order_and_defaults() -> None:
    theirs = inspect.signature(nn.MultiheadAttention.forward).parameters.values()
    *ours, extra = inspect.signature(FusedMultiheadAttention.forward).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert (extra.name, extra.default) == ("cache", None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_gives_same_state_dict_in_same_order(layout: str) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, **LAYOUTS[layout])
    torch.manual_seed(3)
    ours = FusedMultiheadAttention(E, H, **LAYOUTS[layout])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours._version == theirs._version


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_load_strictly_both_ways(layout: str) -> None:
    theirs = nn.MultiheadAttention(E, H, **LAYOUTS[layout])
    ours = FusedMultiheadAttention(E, H, **LAYOUTS[layout])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_is_a_torch_multihead_attention_with_one_child() -> None:
    ours = FusedMultiheadAttention(E, H)
    assert isinstance(ours, nn.MultiheadAttention)
    assert [name for name, _ in ours.named_children()] == ["out_proj"]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("appended", [0, 1, 2])
def test_shapes_of_output_and_weights(
    need_weights: bool, average: bool, batch_first: bool, appended: int
) -> None:
    settings = {"add_bias_kv": appended > 0, "add_zero_attn": appended > 1}
    _, ours = pair(E, H, batch_first=batch_first, **settings)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    result = ours(query, key, key, need_weights=need_weights, average_attn_weights=average)
    assert type(result) is tuple
    out, weights = result
    assert out.shape == query.shape
    if not need_weights:
        assert weights is None
    else:
        heads = () if average else (H,)
        assert weights.shape == (N, *heads, L, S + appended)
        assert weights.dtype == query.dtype


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_equals_batch_of_one(average: bool, batch_first: bool) -> None:
    _, ours = pair(E, H, batch_first=batch_first, add_bias_kv=True)
    query, key = torch.randn(L, E), torch.randn(S, E)
    padding = torch.arange(S) > 4
    mask = torch.randn(H, L, S)
    out, weights = ours(
        query, key, key, key_padding_mask=padding, attn_mask=mask, average_attn_weights=average
    )
    batch = 0 if batch_first else 1
    expected, expected_weights = ours(
        query.unsqueeze(batch),
        key.unsqueeze(batch),
        key.unsqueeze(batch),
        key_padding_mask=padding[None],
        attn_mask=mask,
        average_attn_weights=average,
    )
    torch.testing.assert_close(out, expected.squeeze(batch))
    torch.testing.assert_close(weights, expected_weights.squeeze(0))
    assert out.shape == (L, E)


@pytest.mark.parametrize("batch_first", [True, False])
def test_output_is_contiguous_in_every_layout(batch_first: bool) -> None:
    _, ours = pair(E, H, batch_first=batch_first)
    for x in (torch.randn(N, L, E), torch.randn(L, N, E).transpose(0, 1), torch.randn(L, E)):
        assert ours(x, x, x)[0].is_contiguous()


MASKS = [None, "2d", "3d", "4d", "2d float", "3d float", "4d float"]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_padding_with_gradients(
    mask: str | None, padding: str | None, need_weights: bool
) -> None:
    check(Call(mask=mask, padding=padding), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_layouts_with_gradients(layout: str, need_weights: bool) -> None:
    settings = dict(LAYOUTS[layout])
    sizes = {"kdim": settings.pop("kdim", E), "vdim": settings.pop("vdim", E)}
    for masks in ({}, {"mask": "3d", "padding": "bool"}, {"mask": "2d float", "padding": "float"}):
        check(Call(module=settings, **sizes, **masks), need_weights=need_weights)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_self_attention(dtype: torch.dtype, average: bool) -> None:
    check(Call(self_attention=True, padding="bool", mask="2d", average=average), dtype)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_one_answer_in_every_mode(mode: str, need_weights: bool) -> None:
    """torch.nn gives NaN in some of these and numbers in others for the fully masked row."""
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0] = True
    expected, expected_weights = formula(ours, x, x, x, key_padding_mask=padding)
    ours.train(mode == "train")
    with torch.set_grad_enabled(mode == "train"), torch.inference_mode(mode == "inference_mode"):
        out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[0], ours.out_proj.bias.expand(L, E))
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
        assert torch.equal(weights[0], torch.zeros(L, L))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_row_has_finite_gradients(kind: str, need_weights: bool) -> None:
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(N, L, E, requires_grad=True)
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[2] = True
    if kind == "float":
        mask = torch.zeros(L, L).masked_fill(mask, -torch.inf).requires_grad_()
    out, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
    (out.square().sum() + (weights.square().sum() if need_weights else 0.0)).backward()
    grads = [x.grad, *(p.grad for p in ours.parameters())]
    grads += [mask.grad] if kind == "float" else []
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(out[:, 2], ours.out_proj.bias.expand(N, E))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_masks_with_a_query_of_another_dtype(
    dtype: torch.dtype, need_weights: bool
) -> None:
    """torch.nn refuses this with need_weights=True and accepts it without."""
    _, ours = pair(E, H, batch_first=True, dtype=dtype)
    x = torch.randn(N, L, E, dtype=dtype)
    mask = torch.randn(L, L, requires_grad=True)
    padding = torch.randn(N, L, requires_grad=True)
    out, _ = ours(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
    double = pair(E, H, batch_first=True, dtype=dtype)[1].double()
    expected, _ = formula(double, *[x.double()] * 3, padding.double(), mask.double())
    plain, _ = formula(ours, x, x, x, padding.to(dtype), mask.to(dtype))
    if dtype == torch.float64:
        torch.testing.assert_close(out, expected)
    else:
        assert_within_budget("output", out, plain, expected)
    out.sum().backward()
    assert mask.grad.dtype == padding.grad.dtype == torch.float32
    assert mask.grad.abs().sum() > 0
    assert padding.grad.abs().sum() > 0


@pytest.mark.parametrize(("sizes", "shape"), [
    ((0, L, S), (0, L, E)), ((N, 0, S), (N, 0, E)), ((N, L, 0), (N, L, E)),
])  # fmt: skip
def test_zero_sizes(sizes: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    batch, queries, keys = sizes
    stock, ours = pair(E, H, batch_first=True)
    query, key = torch.randn(batch, queries, E), torch.randn(batch, keys, E)
    out, weights = ours(query, key, key)
    expected, _ = stock(query, key, key, need_weights=False)
    assert out.shape == shape
    assert weights.shape == (batch, queries, keys)
    torch.testing.assert_close(out, expected)
    masked, _ = ours(
        query, key, key,
        key_padding_mask=torch.zeros(batch, keys, dtype=torch.bool),
        attn_mask=torch.zeros(batch * H, queries, keys, dtype=torch.bool),
    )  # fmt: skip
    torch.testing.assert_close(masked, expected)


def test_strides_of_the_inputs_do_not_matter() -> None:
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    expected = ours(x, x, x)[0]
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    strided = torch.randn(N, L, 2 * E)
    strided[..., ::2] = x
    for view in (transposed, strided[..., ::2]):
        torch.testing.assert_close(ours(view, view, view)[0], expected)
    one = x[:, :1].expand(N, L, E)
    same = one.contiguous()
    torch.testing.assert_close(ours(one, one, one)[0], ours(same, same, same)[0])


def test_key_and_value_that_are_one_tensor_give_what_copies_give() -> None:
    stock, ours = pair(E, H, batch_first=True)
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    for inputs in ((x, x, x), (x, memory, memory)):
        copies = [t.clone() for t in inputs]
        torch.testing.assert_close(ours(*inputs)[0], ours(*copies)[0])
        torch.testing.assert_close(ours(*inputs)[0], stock(*copies)[0])


def test_dropout_weights_are_those_that_made_the_output() -> None:
    _, ours = pair(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E)
    out, weights = ours(x, x, x, average_attn_weights=False)
    value = (x @ ours.in_proj_weight[2 * E :].mT + ours.in_proj_bias[2 * E :]).unflatten(
        -1, (H, -1)
    )
    mixed = (weights @ value.transpose(1, 2)).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out, ours.out_proj(mixed))
    assert (weights == 0).any()
    assert not torch.allclose(weights.sum(-1), torch.ones(N, H, L))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extreme_dropout(p: float) -> None:
    _, ours = pair(E, H, dropout=p, batch_first=True)
    x = torch.randn(N, L, E)
    trained, weights = ours(x, x, x)
    if p == 0.0:
        assert torch.equal(trained, ours.eval()(x, x, x)[0])
    else:
        assert torch.equal(weights, torch.zeros(N, L, L))
        assert torch.equal(trained, ours.out_proj.bias.expand(N, L, E))


def test_dropout_acts_in_training_only_and_can_be_changed_later() -> None:
    _, ours = pair(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    plain = ours(x, x, x)[0]
    ours.dropout = 0.5
    assert not torch.allclose(ours(x, x, x)[0], plain)
    torch.manual_seed(7)
    first = ours(x, x, x)[0]
    torch.manual_seed(7)
    assert torch.equal(ours(x, x, x)[0], first)
    assert torch.equal(ours.eval()(x, x, x)[0], plain)


def test_torch_fast_path_switch_has_no_effect() -> None:
    _, ours = pair(E, H, batch_first=True)
    ours.eval()
    x = torch.randn(N, L, E)
    results = []
    for enabled in (True, False):
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            with torch.no_grad():
                results.append(ours(x, x, x)[0])
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
    assert torch.equal(*results)


def test_every_combination_of_settings_agrees_with_torch() -> None:
    flags = itertools.product([False, True], repeat=5)
    for bias, bias_kv, zero_attn, batch_first, own_dims in flags:
        settings = {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero_attn}
        width = 6 if own_dims else E
        dims = {"kdim": 6, "vdim": 6} if own_dims else {}
        stock, ours = pair(E, H, batch_first=batch_first, **settings, **dims)
        query = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
        key = torch.randn(N, S, width) if batch_first else torch.randn(S, N, width)
        for average in (False, True):
            theirs = stock(query, key, key, average_attn_weights=average)
            mine = ours(query, key, key, average_attn_weights=average)
            torch.testing.assert_close(mine, theirs)
