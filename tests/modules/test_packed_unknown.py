"""What may look across positions is called on padded batches: not packed, right at every token."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fused_attn import (
    FusedMultiheadAttention,
    FusedTransformer,
    FusedTransformerDecoder,
    FusedTransformerDecoderLayer,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
    explain,
    fuse,
    unfuse,
)
from fused_attn.modules import token_wise
from tests.cases.packed import FF, E, H, L, N, padding, unpacked

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested", "ignore:The PyTorch API of nested"),
]

HIDDEN = padding([L, 4, 1, 2])
S = 6
MEMORY_HIDDEN = torch.arange(S) >= torch.tensor([3, S, 1, 5])[:, None]


def centred(x: Tensor) -> Tensor:
    """Less the mean over positions, (N, L, E); what packed tokens (T, E) would make nonsense of."""
    assert x.dim() == 3, f"got {tuple(x.shape)}"
    return x - x.mean(dim=1, keepdim=True)


class CentringNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(centred(input))


class CentringLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return centred(super().forward(input))


class CentringDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return centred(super().forward(input))


class CentringIdentity(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return centred(input)


class CentringActivation(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(centred(input))


def replace(name: str, cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    """A change of a stock layer: its child `name` becomes a `cls` of the same parameters."""

    def change(layer: nn.Module) -> None:
        getattr(layer, name).__class__ = cls

    return change


def put(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda layer: setattr(layer, name, copy.deepcopy(value))


def hook(name: str, kind: str) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        child = layer.get_submodule(name)
        if kind == "pre":
            child.register_forward_pre_hook(lambda module, args: (centred(args[0]),))
        else:
            child.register_forward_hook(lambda module, args, out: centred(out))

    return change


def hook_activation(layer: nn.Module) -> None:
    layer.activation = nn.ReLU()
    layer.activation.register_forward_hook(lambda module, args, out: centred(out))


def replace_forward(layer: nn.Module) -> None:
    norm = layer.norm2
    norm.forward = lambda x: F.layer_norm(centred(x), (E,), norm.weight, norm.bias)


def parametrize(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer.linear2)


class Overridden(nn.Module):
    """A parametrization that is asked for its weight while the layer runs."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def own_parametrization(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer.linear1, "weight", Overridden())


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "subclass of LayerNorm": (replace("norm1", CentringNorm), "`norm1` is a CentringNorm"),
    "another subclass": (replace("norm2", CentringNorm), "`norm2` is a CentringNorm"),
    "subclass of Linear": (replace("linear1", CentringLinear), "`linear1` is a CentringLinear"),
    "second Linear": (replace("linear2", CentringLinear), "`linear2` is a CentringLinear"),
    "subclass of Dropout": (replace("dropout1", CentringDropout), "`dropout1` is a Centring"),
    "inner Dropout": (replace("dropout", CentringDropout), "`dropout` is a CentringDropout"),
    "subclass of Identity": (put("dropout2", CentringIdentity()), "`dropout2` is a Centring"),
    "activation function": (put("activation", centred), "`activation` is centred, which may"),
    "lambda": (put("activation", lambda x: F.relu(centred(x))), "`activation` is <lambda>"),
    "activation module": (
        put("activation", CentringActivation()),
        "`activation` is a CentringActivation",
    ),
    "softmax over positions": (put("activation", nn.Softmax(dim=1)), "`activation` is a Softmax"),
    "weights of positions": (put("activation", nn.PReLU(L).double()), "`activation` is a PReLU"),
    "partial": (
        put("activation", functools.partial(F.softmax, dim=1)),
        "`activation` is partial, which may",
    ),
    "norm of two dimensions": (
        put("norm1", nn.LayerNorm((L, E)).double()),
        "`norm1` normalizes over 2 dimensions",
    ),
    "hook on a norm": (hook("norm1", "post"), "a hook on `norm1`"),
    "hook before a linear": (hook("linear1", "pre"), "a hook on `linear1`"),
    "hook on the activation": (hook_activation, "a hook on `activation`"),
    "forward on the instance": (replace_forward, "`forward` of `norm2` was replaced"),
    "weight norm": (parametrize, "`linear2` is a ParametrizedLinear"),
    "parametrization": (own_parametrization, "`linear1` is a ParametrizedLinear"),
}


def numbers(module: nn.Module, inputs: list[Tensor], masks: dict[str, Tensor]) -> list[Tensor]:
    """Output at the tokens, and the gradients of inputs and parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = module(*leaves, **masks)[~HIDDEN]
    wanted = [*leaves, *module.parameters()]
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return module.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_encoder_is_right_at_every_token(change: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, norm_first=norm_first)
    apply, why = CHANGES[change]
    apply(randomized(one))
    x, masks = randn(N, L, E), {"src_key_padding_mask": HIDDEN}
    for stock in (one, nn.TransformerEncoder(one, 2, nn.LayerNorm(E).double())):
        if stock is not one:  # copies share neither hooks' closures nor replaced forwards
            stock.layers = nn.ModuleList([one, one])
        expected = numbers(stock, [x], masks)
        fuse(stock)
        for training in (True, False):
            torch.testing.assert_close(numbers(stock.train(training), [x], masks), expected)
        note = explain(stock, x, **masks).notes[0]
        assert f"not packed: {why}" in note.replace("layers.0.", "")
        unpacked_class = FusedTransformerEncoderLayer if stock is one else FusedTransformerEncoder
        assert type(stock) is unpacked_class
        assert not stock(x, **masks)[HIDDEN].any()
        unfuse(one)


@pytest.mark.parametrize("change", CHANGES)
def test_decoder_is_right_at_every_token(change: str) -> None:
    torch.manual_seed(0)
    one = nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True)
    apply, why = CHANGES[change]
    apply(randomized(one))
    inputs = [randn(N, L, E), randn(N, S, E)]
    masks = {"tgt_key_padding_mask": HIDDEN, "memory_key_padding_mask": MEMORY_HIDDEN}
    for stock in (one, nn.TransformerDecoder(one, 2, nn.LayerNorm(E).double())):
        if stock is not one:
            stock.layers = nn.ModuleList([one, one])
        expected = numbers(stock, inputs, masks)
        fuse(stock)
        torch.testing.assert_close(numbers(stock, inputs, masks), expected)
        assert why in explain(stock, *inputs, **masks).notes[0].replace("layers.0.", "")
        unpacked_class = FusedTransformerDecoderLayer if stock is one else FusedTransformerDecoder
        assert type(stock) is unpacked_class
        assert not stock(*inputs, **masks)[HIDDEN].any()
        unfuse(one)


@pytest.mark.parametrize("cls", [CentringNorm, nn.LayerNorm])
def test_the_last_norm_is_asked_too(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x, masks = randn(N, L, E), {"src_key_padding_mask": HIDDEN}
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    stock = randomized(nn.TransformerEncoder(layer, 2, cls(E)))
    expected = numbers(stock, [x], masks)
    fuse(stock)
    torch.testing.assert_close(numbers(stock, [x], masks), expected)
    note = explain(stock, x, **masks).notes[0]
    assert ("not packed: `norm` is a CentringNorm" in note) == (cls is CentringNorm)


def test_compiled_and_nested_are_right_as_well() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = randomized(nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True))
    replace("norm1", CentringNorm)(stock)
    x, masks = randn(N, L, E), {"src_key_padding_mask": HIDDEN}
    expected = numbers(stock, [x], masks)
    fuse(stock)
    compiled = torch.compile(stock, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(numbers(compiled, [x], masks), expected)
    lengths = (~HIDDEN).sum(1).tolist()
    parts = [x[n, : lengths[n]] for n in range(N)]
    padded = x.masked_fill(HIDDEN[..., None], 0.0)
    right = stock(padded, **masks)
    for layout in (torch.strided, torch.jagged):
        out = stock(torch.nested.as_nested_tensor(parts, layout=layout))
        for n, part in enumerate(out.unbind()):
            torch.testing.assert_close(part, right[n, : lengths[n]])


def test_whole_transformer_with_a_custom_activation_is_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        settings = {"batch_first": True, "dtype": torch.float64}
        stock = nn.Transformer(E, H, 2, 2, FF, 0.0, centred, **settings)
        ours = FusedTransformer(E, H, 2, 2, FF, 0.0, centred, **settings)
    ours.load_state_dict(stock.state_dict())
    for layer in [*stock.decoder.layers]:
        layer.activation = centred  # torch's copies have ReLU
    inputs = [randn(N, S, E), randn(N, L, E)]
    masks = {
        "src_key_padding_mask": MEMORY_HIDDEN, "memory_key_padding_mask": MEMORY_HIDDEN,
        "tgt_key_padding_mask": HIDDEN,
    }  # fmt: skip
    expected, actual = (numbers(model, inputs, masks)[0] for model in (stock, ours))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation", [
    "relu", "gelu", F.silu, torch.tanh, nn.LeakyReLU(), nn.GELU(approximate="tanh"),
    functools.partial(F.leaky_relu, negative_slope=0.2),
    functools.partial(F.gelu, approximate="tanh"),
])  # fmt: skip
def test_known_activations_run_packed(activation: object) -> None:
    ours = FusedTransformerEncoderLayer(E, H, FF, 0.0, activation, batch_first=True)
    notes = explain(ours, torch.randn(N, L, E), None, HIDDEN).notes
    [note] = [note for note in notes if "packed" in note]
    assert "packed: 14 of 28 positions are real" in note


def test_a_class_may_say_that_it_is_token_wise() -> None:
    ours = FusedTransformerEncoderLayer(E, H, FF, 0.0, lambda x: x * x, batch_first=True)
    assert not ours.is_packable()
    ours.activation.token_wise = True
    assert ours.is_packable()
    assert token_wise.is_token_wise(ours.activation)


@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_what_stands_in_for_out_proj_is_given_padded_and_nested_batches(kind: str) -> None:
    """torch.nn reads its weight and never calls it; ours calls it with what torch's layer has."""
    ours = FusedTransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    if kind == "hook":
        hook("self_attn.out_proj", "post")(ours)
    else:
        ours.self_attn.out_proj.__class__ = CentringLinear
    x = torch.randn(N, L, E)
    out = ours(x, src_key_padding_mask=HIDDEN)
    plain = unpacked(ours)(x, src_key_padding_mask=HIDDEN)
    torch.testing.assert_close(out, plain.masked_fill(HIDDEN[..., None], 0.0))
    shapes = []
    attention = FusedMultiheadAttention(E, H, batch_first=True)
    attention.out_proj.register_forward_hook(lambda m, args, out: shapes.append(args[0].is_nested))
    parts = [torch.randn(n, E) for n in (3, 5)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    out = attention(nested, nested, nested, need_weights=False)[0]
    assert shapes == [True]
    for part, single in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(part, attention(single, single, single)[0])


def test_generation_keeps_no_cache_for_what_looks_across_positions() -> None:
    ours = FusedTransformerDecoderLayer(E, H, FF, 0.0, batch_first=True)
    assert ours.is_cacheable()
    ours.norm2.__class__ = CentringNorm
    assert not ours.is_cacheable()
