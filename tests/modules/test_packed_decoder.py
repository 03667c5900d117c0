"""Padding costs nothing in the decoder either: packed targets, packed memory, nested both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_attn import FusedTransformer, FusedTransformerDecoder, FusedTransformerDecoderLayer
from tests.cases.packed import FF, LENGTHS, E, H, L, N, Recording, padding, rows, unpacked

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested"),
]

S = 9
MEMORY_LENGTHS = [3, S, 0, 5]
HIDDEN = padding()
MEMORY_HIDDEN = torch.arange(S) >= torch.tensor(MEMORY_LENGTHS)[:, None]
HOLES = torch.arange(S) % torch.tensor([2, 3, 4, 5])[:, None] == 0
TRIANGLE = torch.ones(L, L, dtype=torch.bool).triu(1)

PADDINGS = {
    "both": {"tgt_key_padding_mask": HIDDEN, "memory_key_padding_mask": MEMORY_HIDDEN},
    "target": {"tgt_key_padding_mask": HIDDEN},
    "memory": {"memory_key_padding_mask": MEMORY_HIDDEN},
    "holes in the memory": {"memory_key_padding_mask": HOLES},
    "causal by mask": {"tgt_key_padding_mask": HIDDEN, "tgt_mask": TRIANGLE},
    "causal by hint": {"tgt_key_padding_mask": HIDDEN, "tgt_is_causal": True},
    "causal memory": {
        "tgt_key_padding_mask": HIDDEN,
        "memory_key_padding_mask": MEMORY_HIDDEN,
        "memory_is_causal": True,
    },
}


def layer(**settings) -> FusedTransformerDecoderLayer:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "activation": Recording(), **settings}
    ours = FusedTransformerDecoderLayer(E, H, FF, **settings)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return ours


def results(
    module: nn.Module, batch_first: bool, arguments: dict, x: Tensor, memory: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Output at the tokens, and gradients of the inputs and parameters."""
    hidden = arguments.get("tgt_key_padding_mask", torch.zeros(N, L, dtype=torch.bool))
    leaves = [x.clone().requires_grad_(), memory.clone().requires_grad_()]
    inputs = leaves if batch_first else [leaf.transpose(0, 1) for leaf in leaves]
    out = module(*inputs, **arguments)
    out = out if batch_first else out.transpose(0, 1)
    wanted = [*leaves, *module.parameters()]
    return out[~hidden], list(torch.autograd.grad(out[~hidden].sin().sum(), wanted))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", PADDINGS)
def test_packed_decoder_gives_the_same_at_every_token(
    name: str, norm_first: bool, batch_first: bool, training: bool
) -> None:
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    one = layer(norm_first=norm_first, batch_first=batch_first)
    tokens = sum(LENGTHS) if "tgt_key_padding_mask" in PADDINGS[name] else N * L
    for model in (one, FusedTransformerDecoder(one, 2, nn.LayerNorm(E))):
        model.train(training)
        plain = unpacked(model)
        out, grads = results(model, batch_first, PADDINGS[name], x, memory)
        expected, expected_grads = results(plain, batch_first, PADDINGS[name], x, memory)
        assert set(rows(model)) == {tokens}
        assert set(rows(plain)) == {N * L}
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, expected_grads)


def test_padding_of_the_memory_is_not_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, projected = layer(), []
    real = ours.multihead_attn._project

    def record(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        projected.append(key.shape)
        return real(query, key, value)

    monkeypatch.setattr(ours.multihead_attn, "_project", record)
    ours(torch.randn(N, L, E), torch.randn(N, S, E), memory_key_padding_mask=MEMORY_HIDDEN)
    assert projected == [(sum(MEMORY_LENGTHS), E)]


def test_output_is_0_at_the_padding_of_the_target() -> None:
    ours = layer()
    out = ours(torch.randn(N, L, E), torch.randn(N, S, E), tgt_key_padding_mask=HIDDEN)
    assert torch.equal(out[HIDDEN], torch.zeros(int(HIDDEN.sum()), E))


def test_unbatched_padding_runs_packed_as_a_batch_of_one_does() -> None:
    ours = layer()
    x, memory = torch.randn(L, E), torch.randn(S, E)
    masks = {"tgt_key_padding_mask": HIDDEN[1], "memory_key_padding_mask": MEMORY_HIDDEN[0]}
    out = ours(x, memory, **masks)
    assert rows(ours) == [LENGTHS[1]]
    batched = ours(x[None], memory[None], **{name: mask[None] for name, mask in masks.items()})
    torch.testing.assert_close(out, batched[0])


def test_nan_in_padding_reaches_nothing() -> None:
    ours, masks = layer(), PADDINGS["both"]
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    expected = ours(x, memory, **masks)
    x = x.masked_fill(HIDDEN[..., None], torch.nan).requires_grad_()
    memory = memory.masked_fill(MEMORY_HIDDEN[..., None], torch.nan).requires_grad_()
    out = ours(x, memory, **masks)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, memory, *ours.parameters()))


@pytest.mark.parametrize("arguments", [
    {"tgt_mask": TRIANGLE.roll(1, 1)}, {"memory_mask": torch.zeros(L, S)},
    {"tgt_key_padding_mask": ~padding([3, 2, 4, 1])},
    {"memory_key_padding_mask": HOLES, "memory_is_causal": True},
    {"memory_key_padding_mask": torch.zeros(N, S)},
], ids=["mask", "memory mask", "padding in front", "causal holes", "float padding"])  # fmt: skip
def test_what_packed_sequences_cannot_say_runs_dense(arguments: dict) -> None:
    ours = layer()
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    arguments = {"tgt_key_padding_mask": HIDDEN, **arguments}
    out = ours(x, memory, **arguments)
    assert rows(ours) == [N * L]
    expected = unpacked(ours)(x, memory, **arguments)
    hidden = arguments["tgt_key_padding_mask"]
    torch.testing.assert_close(out, expected.masked_fill(hidden[..., None], 0.0))


def test_hooks_see_padded_batches() -> None:
    ours, shapes = layer(), []
    ours.multihead_attn.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    ours(torch.randn(N, L, E), torch.randn(N, S, E), **PADDINGS["both"])
    assert shapes == [(N, L, E)]


def test_errors_are_those_of_the_dense_path() -> None:
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    for inputs in ((x[..., 1:], memory), (x, memory[..., 1:]), (x, memory[1:]), (x[1:], memory)):
        texts = []
        for model in (layer(), unpacked(layer())):
            with pytest.raises((AssertionError, RuntimeError)) as caught:
                model(*inputs, **PADDINGS["both"])
            texts.append((caught.type, str(caught.value)))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_nested_decoder_equals_one_sequence_at_a_time(
    causal: bool, hooked: bool, layout: torch.layout
) -> None:
    ours = FusedTransformerDecoder(layer(), 2, nn.LayerNorm(E))
    if hooked:
        ours.layers[0].norm1.register_forward_hook(lambda *_: None)
    targets = [torch.randn(n, E, requires_grad=True) for n in (5, 1, 7)]
    memories = [torch.randn(n, E, requires_grad=True) for n in (2, 6, 3)]
    nested = [torch.nested.as_nested_tensor(x, layout=layout) for x in (targets, memories)]
    out = ours(*nested, tgt_is_causal=causal)
    assert out.layout == layout
    expected = [
        ours(tgt[None], memory[None], tgt_is_causal=causal)[0]
        for tgt, memory in zip(targets, memories, strict=True)
    ]
    torch.testing.assert_close(list(out.unbind()), expected)
    leaves = [*targets, *memories]
    grads, wanted = (
        torch.autograd.grad(torch.cat(list(parts)).sin().sum(), leaves)
        for parts in (out.unbind(), expected)
    )
    torch.testing.assert_close(grads, wanted)


def test_what_cannot_go_with_nested_tensors_raises() -> None:
    ours = layer()
    tgt = torch.nested.nested_tensor([torch.randn(n, E) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(AssertionError, match="both be NestedTensors"):
        ours(tgt, torch.randn(2, S, E))
    with pytest.raises(AssertionError, match="must come without masks"):
        ours(tgt, tgt, tgt_mask=torch.zeros(3, 3))
    with pytest.raises(AssertionError, match="batch_first=True"):
        layer(batch_first=False)(tgt, tgt)


def test_whole_transformer_with_padding_on_both_sides_agrees_with_torch() -> None:
    torch.manual_seed(0)
    stock = nn.Transformer(E, H, 2, 2, FF, 0.0, batch_first=True)
    ours = FusedTransformer(E, H, 2, 2, FF, 0.0, batch_first=True)
    ours.load_state_dict(stock.state_dict())
    src, tgt = torch.randn(N, S, E), torch.randn(N, L, E)
    lengths = torch.tensor([3, S, 1, 5])  # torch's own rows without keys are NaN
    src_hidden, tgt_hidden = torch.arange(S) >= lengths[:, None], padding([L, 4, 1, 2])
    masks = {
        "tgt_mask": TRIANGLE, "src_key_padding_mask": src_hidden,
        "tgt_key_padding_mask": tgt_hidden, "memory_key_padding_mask": src_hidden,
    }  # fmt: skip
    expected = stock(src, tgt, **masks)
    for training in (True, False):
        out = ours.train(training)(src, tgt, **masks)
        torch.testing.assert_close(out[~tgt_hidden], expected[~tgt_hidden])
        assert not out[tgt_hidden].any()
