"""0 at padding on every path while `pack_padding` is on, torch.nn's numbers while it is off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_attn import (
    FusedTransformer,
    FusedTransformerDecoder,
    FusedTransformerEncoder,
    Seq2SeqTransformer,
    fuse,
)
from fused_attn.modules.packable import PackableLayer
from tests.cases.packed import FF, E, H, L, N, padding

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested", "ignore:The PyTorch API of nested"),
]

S = 6
AT_END = padding([L, 4, 1, 2])
IN_FRONT = AT_END.flip(1)
HOLES = torch.arange(L) % torch.tensor([2, 3, 4, 5])[:, None] == 1
MEMORY_HIDDEN = torch.arange(S) >= torch.tensor([3, S, 1, 5])[:, None]
HIDDEN_OF = {L: AT_END, S: MEMORY_HIDDEN}
KINDS = ["encoder layer", "encoder", "decoder layer", "decoder", "transformer"]


def floating(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


def stock_of(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "activation": nn.GELU(), **settings}
    if kind == "transformer":
        model: nn.Module = nn.Transformer(E, H, 2, 2, FF, **settings)
    elif "encoder" in kind:
        model = nn.TransformerEncoderLayer(E, H, FF, **settings)
        if kind == "encoder":
            model = nn.TransformerEncoder(model, 2, nn.LayerNorm(E))
    else:
        model = nn.TransformerDecoderLayer(E, H, FF, **settings)
        if kind == "decoder":
            model = nn.TransformerDecoder(model, 2, nn.LayerNorm(E))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    for layer in model.modules():  # torch's copies of a decoder layer have ReLU
        if isinstance(layer, nn.TransformerDecoderLayer):
            layer.activation = nn.GELU()
    return model


def inputs_of(kind: str) -> list[Tensor]:
    torch.manual_seed(1)
    x, other = torch.randn(N, L, E), torch.randn(N, S, E)
    if "encoder" in kind:
        return [x]
    return [other, x] if kind == "transformer" else [x, other]


def masks_of(kind: str, hidden: Tensor) -> dict[str, Tensor]:
    if "encoder" in kind:
        return {"src_key_padding_mask": hidden}
    masks = {"tgt_key_padding_mask": hidden, "memory_key_padding_mask": MEMORY_HIDDEN}
    return masks | {"src_key_padding_mask": MEMORY_HIDDEN} if kind == "transformer" else masks


def answer(module: nn.Module, inputs: list[Tensor], arguments: dict) -> list[Tensor]:
    """The output, and gradients of inputs and parameters through all of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = module(*leaves, **arguments)
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


def poisoned(inputs: list[Tensor], stored: float | None) -> list[Tensor]:
    """The inputs with `stored` at padding."""
    if stored is None:
        return inputs
    return [x.masked_fill(HIDDEN_OF[x.shape[1]][..., None], stored) for x in inputs]


def hooked(module: nn.Module) -> nn.Module:
    layers = [m for m in module.modules() if isinstance(m, PackableLayer)]
    for layer in layers:
        layer.norm1.register_forward_hook(lambda *_: None)
    return module


def hooked_itself(module: nn.Module) -> nn.Module:
    for layer in [m for m in module.modules() if isinstance(m, PackableLayer)]:
        layer.register_forward_hook(lambda *_: None)
    return module


def replaced(module: nn.Module) -> nn.Module:
    for layer in [m for m in module.modules() if isinstance(m, PackableLayer)]:
        layer.linear2 = nn.Sequential(layer.linear2)
    return module


def one_replaced(module: nn.Module) -> nn.Module:
    layer = [m for m in module.modules() if isinstance(m, PackableLayer)][-1]
    layer.norm2 = nn.Sequential(layer.norm2)
    return module


def compiled(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


PATHS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hooks": hooked, "hooks on the layer": hooked_itself, "replaced children": replaced,
    "one replaced child": one_replaced,
}  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_path_gives_what_the_packed_one_gives(kind: str, norm_first: bool) -> None:
    stock = stock_of(kind, norm_first=norm_first)
    fuse(stock)
    inputs, masks = inputs_of(kind), masks_of(kind, AT_END)
    expected = answer(stock, inputs, masks)
    assert not expected[0][AT_END].any()
    for change in PATHS.values():
        other = change(copy.deepcopy(stock))
        torch.testing.assert_close(answer(other, inputs, masks), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(other.eval()(*inputs, **masks), expected[0])


@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer", "transformer"])
def test_compiled_gives_what_the_packed_one_gives_whatever_is_stored_at_padding(kind: str) -> None:
    ours = stock_of(kind)
    fuse(ours)
    inputs, masks = inputs_of(kind), masks_of(kind, AT_END)
    expected = answer(ours, inputs, masks)
    other = compiled(ours)
    for stored in (None, torch.nan, 1e38):
        actual = answer(other, poisoned(inputs, stored), masks)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compiled_for_any_length_gives_0_at_padding() -> None:
    torch._dynamo.reset()
    ours = stock_of("encoder").eval()
    fuse(ours)
    other = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    for length in (L, L - 2):
        x, hidden = torch.randn(N, length, E), HOLES[:, :length]
        out = other(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(out, ours(x, src_key_padding_mask=hidden))
        assert not out[hidden].any()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [IN_FRONT, HOLES, floating(AT_END), floating(HOLES)],
                         ids=["in front", "holes", "floating", "floating holes"])  # fmt: skip
def test_padding_anywhere_and_of_any_mask_gives_0_and_torch_s_numbers_elsewhere(
    hidden: Tensor, kind: str, batch_first: bool
) -> None:
    stock = stock_of(kind, batch_first=batch_first)
    inputs = [x if batch_first else x.transpose(0, 1) for x in inputs_of(kind)]
    masks = masks_of(kind, hidden)
    expected = stock(*inputs, **masks)
    fuse(stock)
    rows = hidden if hidden.dtype == torch.bool else hidden == -torch.inf
    rows = rows if batch_first else rows.t()
    out = stock(*inputs, **masks)
    torch.testing.assert_close(out, expected.masked_fill(rows[..., None], 0.0))
    stock.pack_padding = False
    torch.testing.assert_close(stock(*inputs, **masks), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_pack_padding_torch_s_numbers_on_every_path(
    kind: str, norm_first: bool, training: bool
) -> None:
    stock = stock_of(kind, norm_first=norm_first)
    inputs, masks = inputs_of(kind), masks_of(kind, AT_END)
    expected = answer(stock, inputs, masks)
    fuse(stock)
    stock.train(training).pack_padding = False
    assert not any(m.pack_padding for m in stock.modules() if isinstance(m, PackableLayer))
    for change in (lambda module: module, hooked):
        actual = answer(change(copy.deepcopy(stock)), inputs, masks)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    stock.pack_padding = True
    assert not stock(*inputs, **masks)[AT_END].any()


def test_compiled_without_pack_padding_gives_torch_s_numbers() -> None:
    stock = stock_of("encoder")
    inputs, masks = inputs_of("encoder"), masks_of("encoder", AT_END)
    expected = answer(stock, inputs, masks)
    fuse(stock)
    stock.pack_padding = False
    torch.testing.assert_close(
        answer(compiled(stock), inputs, masks), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("arguments", [
    {"src_mask": torch.ones(L, L).triu(1).roll(1, 1) > 0}, {"src_mask": torch.full((L, L), 0.5)},
    {"src_mask": torch.zeros(L, L), "is_causal": True},
], ids=["other mask", "soft mask", "causal"])  # fmt: skip
def test_masks_beside_the_padding(arguments: dict) -> None:
    stock = stock_of("encoder layer")
    x = torch.randn(N, L, E)
    fuse(stock)
    plain = copy.deepcopy(stock)
    plain.pack_padding = False
    masks = {**arguments, "src_key_padding_mask": AT_END}
    expected = plain(x, **masks).masked_fill(AT_END[..., None], 0.0)
    torch.testing.assert_close(stock(x, **masks), expected)


def test_a_mask_of_no_padding_and_soft_masks_hide_nothing() -> None:
    stock = stock_of("encoder")
    x = torch.randn(N, L, E)
    for mask in (AT_END & False, torch.zeros(N, L), torch.randn(N, L), floating(AT_END) * 0 - 1e9):
        mask = mask.nan_to_num()
        expected = copy.deepcopy(stock)(x, src_key_padding_mask=mask)
        ours = copy.deepcopy(stock)
        fuse(ours)
        torch.testing.assert_close(ours(x, src_key_padding_mask=mask), expected)


@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
def test_unbatched(kind: str) -> None:
    ours = stock_of(kind)
    fuse(ours)
    x, mask = torch.randn(L, E), AT_END[1]
    expected = ours(x, src_key_padding_mask=mask)
    assert not expected[mask].any()
    out = hooked(ours)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ours(x, src_key_padding_mask=floating(mask)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.nan, torch.inf, 1e38])
def test_whatever_is_stored_at_padding_reaches_no_output_and_no_gradient(
    stored: float, kind: str
) -> None:
    ours = stock_of(kind)
    fuse(ours)
    inputs, masks = inputs_of(kind), masks_of(kind, AT_END)
    expected = answer(ours, inputs, masks)
    for name, change in PATHS.items():
        if stored == 1e38 and name != "hooks on the layer":
            continue  # what may look across positions is given all finite numbers, as by torch.nn
        other = change(copy.deepcopy(ours))
        actual = answer(other, poisoned(inputs, stored), masks)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for x, grad in zip(inputs, actual[1:], strict=False):
            assert not grad[HIDDEN_OF[x.shape[1]]].any()


class Foreign(nn.TransformerEncoderLayer):
    """A layer of somebody else."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) + 1.0


def test_stacks_of_other_people_s_layers_give_0_too_unless_told_otherwise() -> None:
    stock = nn.TransformerEncoder(Foreign(E, H, FF, 0.0, batch_first=True), 2, nn.LayerNorm(E))
    x = torch.randn(N, L, E)
    expected = stock(x, src_key_padding_mask=AT_END)
    fuse(stock)
    assert type(stock) is FusedTransformerEncoder
    out = stock(x, src_key_padding_mask=AT_END)
    torch.testing.assert_close(out, expected.masked_fill(AT_END[..., None], 0.0))
    stock.pack_padding = False
    torch.testing.assert_close(stock(x, src_key_padding_mask=AT_END), expected)
    mixed = FusedTransformerDecoder(stock_of("decoder layer"), 2)
    out = mixed(*inputs_of("decoder"), **masks_of("decoder", HOLES))
    assert not out[HOLES].any()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_export_gives_0_at_padding(kind: str, strict: bool) -> None:
    ours = stock_of(kind)
    fuse(ours)
    ours.eval()
    inputs, masks = tuple(inputs_of(kind)), masks_of(kind, HOLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(ours, inputs, masks, strict=strict).module()
    torch.testing.assert_close(exported(*inputs, **masks), ours(*inputs, **masks))
    assert not exported(*inputs, **masks)[HOLES].any()


def test_seq2seq_model_gives_the_same_eager_and_compiled_at_every_position() -> None:
    torch.manual_seed(0)
    model = Seq2SeqTransformer(11, 13, E, H, 2, 2, FF, 0.0)
    src, tgt = torch.randint(1, 11, (N, S)), torch.randint(1, 13, (N, L))
    src, tgt = src.masked_fill(MEMORY_HIDDEN, 0), tgt.masked_fill(AT_END, 0)
    expected = model(src, tgt)
    assert not expected[AT_END].any()
    torch.testing.assert_close(compiled(model)(src, tgt), expected)
    torch.testing.assert_close(hooked(model)(src, tgt), expected)


@pytest.mark.parametrize("kind", ["encoder layer", "encoder", "decoder"])
def test_masking_keeps_derivatives_of_every_order(kind: str) -> None:
    ours = stock_of(kind).double()
    fuse(ours)
    hooked(ours)
    inputs, masks = [x.double() for x in inputs_of(kind)], masks_of(kind, HOLES)

    def run(*inputs: Tensor) -> Tensor:
        return ours(*inputs, **masks)

    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        run, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_per_sample_gradients_see_no_padding() -> None:
    ours = stock_of("encoder")
    fuse(ours)
    x = torch.randn(N, L, E)

    def loss(parameters: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        settings = {"src_key_padding_mask": mask[None]}
        return torch.func.functional_call(ours, parameters, (x[None],), settings).sin().sum()

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    grad = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    per_sample = grad(parameters, x.masked_fill(AT_END[..., None], torch.nan), AT_END)
    ours(x, src_key_padding_mask=AT_END).sin().sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad, rtol=1e-4, atol=1e-4)


def test_a_learned_floating_padding_mask_keeps_its_gradient() -> None:
    stock = stock_of("encoder layer")
    ours = copy.deepcopy(stock)
    fuse(ours)
    x, grads = torch.randn(N, L, E), []
    for module in (stock, ours):
        mask = torch.randn(N, L, generator=torch.Generator().manual_seed(2))
        mask = mask.masked_fill(HOLES, -torch.inf).requires_grad_()
        out = module(x, src_key_padding_mask=mask)[~HOLES]
        grads.append(torch.autograd.grad(out.sin().sum(), mask)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_transformer_sets_its_layers() -> None:
    model = FusedTransformer(E, H, 1, 1, FF)
    assert model.pack_padding
    model.decoder.layers[0].pack_padding = False
    assert not model.pack_padding
    assert model.encoder.pack_padding
    model.pack_padding = True
    assert model.decoder.layers[0].pack_padding
