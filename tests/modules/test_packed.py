"""Padding costs nothing: packed execution of padded batches, and NestedTensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from fused_attn import (
    FusedMultiheadAttention,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
    fuse,
)
from tests.cases.packed import FF, LENGTHS, E, H, L, N, Recording, padding, rows, unpacked

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

LAYOUTS = [torch.strided, torch.jagged]


def layer(**settings) -> FusedTransformerEncoderLayer:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "activation": Recording(), **settings}
    ours = FusedTransformerEncoderLayer(E, H, FF, **settings)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return ours


def stack(prototype: FusedTransformerEncoderLayer) -> FusedTransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FusedTransformerEncoder(prototype, 2, nn.LayerNorm(E))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_packed_layer_gives_the_same_at_every_token(
    norm_first: bool, batch_first: bool, training: bool
) -> None:
    ours = layer(norm_first=norm_first, batch_first=batch_first).train(training)
    plain = unpacked(ours)
    hidden = padding()
    x = torch.randn(N, L, E)
    results = []
    for module in (ours, plain):
        leaf = x.clone().requires_grad_()
        src = leaf if batch_first else leaf.transpose(0, 1)
        out = module(src, src_key_padding_mask=hidden)
        out = out if batch_first else out.transpose(0, 1)
        out[~hidden].sin().sum().backward()
        grads = [p.grad for p in module.parameters()]
        results.append((out, leaf.grad, grads))
    assert rows(ours) == [sum(LENGTHS)]
    assert rows(plain) == [N * L]
    (out, grad, grads), (expected, expected_grad, expected_grads) = results
    torch.testing.assert_close(out[~hidden], expected[~hidden])
    assert torch.equal(out[hidden], torch.zeros(int(hidden.sum()), E))
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(grads, expected_grads)


def test_tokens_are_found_in_any_memory_layout() -> None:
    ours, hidden = layer(batch_first=False), padding()
    x = torch.randn(N, L, E)
    expected = layer()(x, src_key_padding_mask=hidden).transpose(0, 1)
    strided = torch.randn(L, 2 * N, E)[:, ::2].copy_(x.transpose(0, 1))
    for src in (x.transpose(0, 1), x.transpose(0, 1).contiguous(), strided):
        torch.testing.assert_close(ours(src, src_key_padding_mask=hidden), expected)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_packs_once_for_all_layers_and_agrees_with_torch(training: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(E, H, FF, 0.0, Recording(), batch_first=True),
            2,
            nn.LayerNorm(E),
        )
    hidden = padding([L, 4, 1, 2])
    x = torch.randn(N, L, E)
    expected = stock(x, src_key_padding_mask=hidden)
    rows(stock)
    fuse(stock)
    out = stock.train(training)(x, src_key_padding_mask=hidden)
    assert rows(stock) == [L + 4 + 1 + 2] * 2
    torch.testing.assert_close(out[~hidden], expected[~hidden])


TRIANGLE = torch.ones(L, L, dtype=torch.bool).triu(1)
CAUSAL = {
    "hint": {"is_causal": True},
    "bool": {"src_mask": TRIANGLE},
    "float": {"src_mask": nn.Transformer.generate_square_subsequent_mask(L)},
    "mask and hint": {"src_mask": TRIANGLE, "is_causal": True},
    "hint and a mask of nothing": {"src_mask": torch.zeros(L, L), "is_causal": True},
    "mask of nothing": {"src_mask": TRIANGLE & False},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_and_padding_together_run_packed(name: str, training: bool) -> None:
    hidden = padding([L, 4, 1, 2])
    x = torch.randn(N, L, E)
    for model in (layer(), stack(layer())):
        plain = unpacked(model.train(training))
        arguments = dict(CAUSAL[name])
        if isinstance(model, FusedTransformerEncoder) and "src_mask" in arguments:
            arguments["mask"] = arguments.pop("src_mask")
        out = model(x, src_key_padding_mask=hidden, **arguments)
        assert set(rows(model)) == {L + 4 + 1 + 2}
        expected = plain(x, src_key_padding_mask=hidden, **arguments)
        assert set(rows(plain)) == {N * L}
        torch.testing.assert_close(out[~hidden], expected[~hidden])


@pytest.mark.parametrize("mask", [
    TRIANGLE.roll(1, 1), torch.full((L, L), 0.5), TRIANGLE.expand(N * H, -1, -1),
    torch.zeros(L, L).masked_fill(TRIANGLE, -1e9), torch.zeros(L, L, requires_grad=True),
], ids=["other", "soft", "3-D", "large but finite", "learned"])  # fmt: skip
def test_masks_that_are_not_causal_run_dense(mask: Tensor) -> None:
    ours = layer()
    hidden = padding([L, 4, 1, 2])
    out = ours(torch.randn(N, L, E), src_mask=mask, src_key_padding_mask=hidden)
    assert rows(ours) == [N * L]
    if mask.requires_grad:
        out[~hidden].sin().sum().backward()
        assert float(mask.grad.abs().max()) > 0


def test_attention_with_appended_keys_runs_dense() -> None:
    ours = layer()
    ours.self_attn = FusedMultiheadAttention(E, H, add_bias_kv=True, batch_first=True)
    x, hidden = torch.randn(N, L, E), padding([L, 4, 1, 2])
    out = ours(x, src_key_padding_mask=hidden)
    assert rows(ours) == [N * L]
    expected = unpacked(ours)(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(out, expected.masked_fill(hidden[..., None], 0.0))


def test_unbatched_padding_runs_packed_as_a_batch_of_one_does() -> None:
    ours = layer()
    x, hidden = torch.randn(L, E), padding([4])[0]
    out = ours(x, src_key_padding_mask=hidden)
    assert rows(ours) == [4]
    batched = ours(x[None], src_key_padding_mask=hidden[None])[0]
    torch.testing.assert_close(out, batched)


@pytest.mark.parametrize("hidden", [
    padding([L] * N), ~padding([3, 2, 4, 1]), torch.eye(N, L, dtype=torch.bool),
    torch.eye(N, L, dtype=torch.bool) | padding([L - 1] * N),
], ids=["no padding", "padding in front", "holes", "holes and an end"])  # fmt: skip
def test_masks_that_are_no_padding_at_the_end_run_dense(hidden: Tensor) -> None:
    ours = layer()
    x = torch.randn(N, L, E)
    out = ours(x, src_key_padding_mask=hidden)
    assert rows(ours) == [N * L]
    float_mask = torch.zeros(N, L).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(out, ours(x, src_key_padding_mask=float_mask))


def test_hooks_see_padded_batches() -> None:
    ours = layer()
    shapes = []
    handle = ours.linear1.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    x, hidden = torch.randn(N, L, E), padding()
    out = ours(x, src_key_padding_mask=hidden)
    assert shapes == [(N, L, FF)]
    handle.remove()
    torch.testing.assert_close(ours(x, src_key_padding_mask=hidden)[~hidden], out[~hidden])


def test_nan_in_padding_reaches_nothing() -> None:
    ours = layer()
    hidden = padding([L, 4, 1, 2])
    x = torch.randn(N, L, E)
    expected = ours(x, src_key_padding_mask=hidden)
    poisoned = x.masked_fill(hidden[..., None], torch.nan).requires_grad_()
    out = ours(poisoned, src_key_padding_mask=hidden)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_compiled_layer_agrees_at_tokens_and_padding() -> None:
    torch._dynamo.reset()
    ours = layer(activation="gelu")
    hidden = padding([L, 4, 1, 2])
    x = torch.randn(N, L, E)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out = compiled(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(out, ours(x, src_key_padding_mask=hidden))


def test_packed_layer_has_double_backward_and_jvp() -> None:
    ours = layer(activation="gelu").double()
    hidden = padding([L, 2, 1, 0])
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ours(x, src_key_padding_mask=hidden)[~hidden]

    assert torch.autograd.gradcheck(
        run, x, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_packed_layer_pulls_many_vectors_back_at_once() -> None:
    ours = layer(activation="gelu")
    hidden = padding([L, 2, 1, 0])
    x = torch.randn(N, L, E, requires_grad=True)
    out = ours(x, src_key_padding_mask=hidden)
    vectors = torch.randn(3, N, L, E)

    def pull_back(vector: Tensor) -> Tensor:
        return torch.autograd.grad(out, x, vector, retain_graph=True)[0]

    expected = torch.stack([pull_back(vector) for vector in vectors])
    torch.testing.assert_close(torch.func.vmap(pull_back)(vectors), expected)
    together = torch.autograd.grad(out, x, vectors, is_grads_batched=True)[0]
    torch.testing.assert_close(together, expected)


def test_autocast_with_padding() -> None:
    """torch.nn's nested path raises a dtype error here."""
    ours = layer(activation="gelu")
    hidden = padding([L, 4, 1, 2])
    x = torch.randn(N, L, E)
    expected = ours(x, src_key_padding_mask=hidden)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, torch.autocast("cpu", torch.bfloat16):
            out = ours(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def ragged(lengths: list[int], requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(n, E, requires_grad=requires_grad) for n in lengths]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("stacked", [False, True])
def test_nested_encoder_equals_one_sequence_at_a_time(
    stacked: bool, norm_first: bool, layout: torch.layout
) -> None:
    ours: nn.Module = layer(norm_first=norm_first, activation="gelu")
    if stacked:
        ours = stack(ours)
    parts = ragged([5, 1, 7], requires_grad=True)
    out = ours(torch.nested.as_nested_tensor(parts, layout=layout))
    assert out.is_nested
    assert out.layout == layout
    for actual, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(actual, ours(part[None])[0])
    torch.cat([t.sin() for t in out.unbind()]).sum().backward()
    grads = [p.grad.clone() for p in parts]
    for part in parts:
        part.grad = None
        ours(part[None]).sin().sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in parts])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_encoder_with_hooks_agrees(layout: torch.layout) -> None:
    ours = layer(activation="gelu")
    x = torch.nested.as_nested_tensor(ragged([5, 1, 7]), layout=layout)
    expected = ours(x)
    ours.norm1.register_forward_hook(lambda *_: None)
    for actual, right in zip(ours(x).unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(actual, right)


def test_stock_encoder_in_inference_hands_us_strided_nested_tensors() -> None:
    ours = layer(activation="relu").eval()
    encoder = nn.TransformerEncoder(ours, 2).eval()
    assert encoder.use_nested_tensor
    hidden = padding([L, 4, 1, 2])
    x = torch.randn(N, L, E)
    expected = encoder(x, src_key_padding_mask=hidden)
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(out[~hidden], expected[~hidden])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [
    {}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 5},
])  # fmt: skip
@pytest.mark.parametrize("need_weights", [False, True])
def test_nested_attention_equals_one_sequence_at_a_time(
    need_weights: bool, settings: dict, layout: torch.layout
) -> None:
    ours = FusedMultiheadAttention(E, H, batch_first=True, **settings)
    lengths, key_lengths = [5, 1, 7], [3, 6, 2]
    query = ragged(lengths)
    key = [torch.randn(n, settings.get("kdim", E)) for n in key_lengths]
    value = [torch.randn(n, settings.get("vdim", E)) for n in key_lengths]
    nested = [torch.nested.as_nested_tensor(x, layout=layout) for x in (query, key, value)]
    out, weights = ours(*nested, need_weights=need_weights)
    appended = len(settings) if "kdim" not in settings else 0
    for i, actual in enumerate(out.unbind()):
        expected, expected_weights = ours(query[i], key[i], value[i])
        torch.testing.assert_close(actual, expected)
        if need_weights:
            padded = torch.zeros(7, 6 + appended)
            kept = key_lengths[i]
            padded[: lengths[i], :kept] = expected_weights[:, :kept]
            padded[: lengths[i], 6:] = expected_weights[:, kept:]
            torch.testing.assert_close(weights[i], padded)
    assert (weights is None) != need_weights


def test_jagged_attention_trains() -> None:
    ours = FusedMultiheadAttention(E, H, batch_first=True)
    parts = ragged([5, 1, 7], requires_grad=True)
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    out, _ = ours(x, x, x, need_weights=False)
    out.values().sin().sum().backward()
    grads = [p.grad.clone() for p in parts]
    for part in parts:
        part.grad = None
        ours(part, part, part)[0].sin().sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in parts])


def test_what_cannot_go_with_a_nested_tensor_raises_as_torch() -> None:
    x = torch.nested.as_nested_tensor(ragged([5, 1]), layout=torch.jagged)
    ours = FusedMultiheadAttention(E, H, batch_first=True)
    for arguments in (
        {"key_padding_mask": torch.zeros(2, 5) > 0},
        {"attn_mask": torch.zeros(5, 5) > 0},
        {"key": torch.randn(2, 5, E), "value": torch.randn(2, 5, E)},
    ):
        with pytest.raises(AssertionError, match="does not support NestedTensor"):
            ours(**{"query": x, "key": x, "value": x, **arguments})
    with pytest.raises(AssertionError, match="batch_first"):
        FusedMultiheadAttention(E, H)(x, x, x)
    with pytest.raises(AssertionError, match="must come without masks"):
        layer()(x, src_mask=torch.zeros(5, 5) > 0)
    empty = torch.nested.nested_tensor([])
    with pytest.raises(AssertionError, match="received 1-D query"):
        ours(empty, empty, empty)
    for model in (layer(), stack(layer())):
        with pytest.raises(AssertionError, match="does not support NestedTensor outside"):
            model(empty)


def test_compiled_layer_takes_jagged_tensors_as_one_graph_and_trains() -> None:
    torch._dynamo.reset()
    ours = layer(activation="gelu")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 1, 7], [2, 4, 3]):
        parts = ragged(lengths, requires_grad=True)
        grads = []
        for run in (compiled, ours):
            out = run(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
            grads.append(torch.autograd.grad(out.values().sin().sum(), parts))
        torch.testing.assert_close(*grads)
