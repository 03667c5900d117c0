"""Layers, stacks and the whole Transformer: torch.nn's contract (values are in torch_suite too)."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import (
    FusedTransformer,
    FusedTransformerDecoder,
    FusedTransformerDecoderLayer,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
    fuse,
)
from fused_attn.modules import DROP_INS
from fused_attn.testing import assert_within_budget, gradients

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:enable_ne")]

N, L, S, E, H, FF = 3, 6, 8, 16, 4, 32
STOCK_LAYERS = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
LAYERS = {"encoder": FusedTransformerEncoderLayer, "decoder": FusedTransformerDecoderLayer}


def pair(kind: str, **settings) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours with the same random parameters, biases and norms included."""
    settings = {"dropout": 0.0, "batch_first": True, **settings}
    torch.manual_seed(0)
    stock = STOCK_LAYERS[kind](E, H, FF, **settings)
    for parameter in stock.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    ours = LAYERS[kind](E, H, FF, **settings)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(N, L, E, dtype=dtype)
    return [x] if kind == "encoder" else [x, torch.randn(N, S, E, dtype=dtype)]


@pytest.mark.parametrize("cls", [c for c in DROP_INS if "Transformer" in c.__name__])
def test_forward_has_torch_names_order_and_defaults(cls: type) -> None:
    theirs = inspect.signature(cls.forward).parameters.values()
    ours = [
        (p.name, p.default) for p in inspect.signature(DROP_INS[cls].forward).parameters.values()
    ]
    extra = [] if cls is nn.Transformer else [("cache", None)]
    assert ours == [(p.name, p.default) for p in theirs] + extra


@pytest.mark.parametrize("settings", [
    {}, {"bias": False}, {"norm_first": True}, {"activation": nn.GELU()}, {"batch_first": True},
])  # fmt: skip
def test_same_seed_gives_same_model(settings: dict) -> None:
    models = []
    for cls in (nn.Transformer, FusedTransformer):
        torch.manual_seed(3)
        models.append(cls(E, H, 2, 2, FF, **settings))
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


def test_constructors_make_our_modules_throughout() -> None:
    for module in FusedTransformer(E, H, 1, 1, FF).modules():
        assert type(module) not in DROP_INS


def test_custom_encoder_and_decoder_are_left_as_given() -> None:
    encoder, decoder = nn.Identity(), nn.Identity()
    model = FusedTransformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_within_the_error_budget(kind: str, norm_first: bool, dtype: torch.dtype) -> None:
    # Not relu: a rounding error that crosses its kink makes a gradient jump.
    stock, ours = pair(kind, norm_first=norm_first, dtype=dtype, activation="gelu")
    outputs, grads = [], []
    for module, double in ((ours, False), (stock, False), (copy.deepcopy(stock).double(), True)):
        x = [t.double() if double else t for t in inputs(kind, dtype)]
        out = module(*x)
        outputs.append(out)
        grads.append(torch.cat([g.flatten() for g in gradients([out], list(module.parameters()))]))
    assert_within_budget("output", *outputs)
    assert_within_budget("gradients", *grads, factor=3.0)


ACTIVATIONS: dict[str, str | Callable[[Tensor], Tensor]] = {
    "relu": "relu", "gelu": "gelu", "module": nn.SiLU(), "function": torch.tanh,
    "tanh-gelu": nn.GELU(approximate="tanh"), "lambda": lambda x: x * x,
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_any_activation_runs_as_given_in_inference_too(kind: str, activation: str) -> None:
    """torch.nn's inference path takes tanh-GELU for exact GELU."""
    stock, ours = pair(kind, activation=ACTIVATIONS[activation])
    expected = stock(*inputs(kind))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(*inputs(kind)), expected)


def test_unknown_activation_string_raises_as_torch() -> None:
    with pytest.raises(RuntimeError, match="relu/gelu"):
        FusedTransformerEncoderLayer(E, H, activation="silu")


MASKS = {
    "bool": lambda q, k: torch.rand(q, k) < 0.3,
    "float": lambda q, k: torch.randn(q, k),
    "3-D": lambda q, k: torch.randn(N * H, q, k),
    "alibi": lambda q, k: -torch.arange(k).expand(q, k).float(),
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("mask", MASKS)
def test_encoder_layer_masks_are_read_the_same_in_every_mode(mask: str, mode: str) -> None:
    """torch.nn's inference path reads floating masks as bool."""
    stock, ours = pair("encoder")
    (x,) = inputs("encoder")
    src_mask = MASKS[mask](L, L)
    if src_mask.dtype == torch.bool:
        src_mask.fill_diagonal_(False)
    expected = stock(x, src_mask=src_mask)
    ours.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        torch.testing.assert_close(ours(x, src_mask=src_mask), expected)


def test_soft_float_padding_is_added_in_inference() -> None:
    stock, ours = pair("encoder")
    (x,) = inputs("encoder")
    padding = torch.randn(N, L)
    expected = stock(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, src_key_padding_mask=padding), expected)


def test_decoder_layer_masks() -> None:
    stock, ours = pair("decoder")
    x, memory = inputs("decoder")
    masks = {
        "tgt_mask": torch.ones(L, L, dtype=torch.bool).triu(1),
        "memory_mask": torch.randn(L, S),
        "memory_key_padding_mask": torch.arange(S) >= torch.tensor([S, 4, 1])[:, None],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stock(x, memory, **masks)
    torch.testing.assert_close(ours(x, memory, **masks), expected)
    torch.testing.assert_close(ours(x, memory, **masks, tgt_is_causal=True), expected)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_causal_hint_is_obeyed_in_every_mode_with_or_without_a_mask(mode: str) -> None:
    model = FusedTransformer(E, H, 1, 1, FF, dropout=0.0, batch_first=True)
    src, tgt = torch.randn(N, S, E), torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    expected = model(src, tgt, tgt_mask=mask)
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        for tgt_mask in (None, mask, mask < 0):
            torch.testing.assert_close(
                model(src, tgt, tgt_mask=tgt_mask, tgt_is_causal=True), expected
            )
        torch.testing.assert_close(model(src, tgt, tgt_mask=mask < 0), expected)


def test_dropout_of_one_leaves_the_residual_stream_alone() -> None:
    """Every one of the four dropout sites acts, and only in training."""
    for norm_first in (False, True):
        _, ours = pair("encoder", dropout=1.0, norm_first=norm_first)
        (x,) = inputs("encoder")
        expected = x if norm_first else ours.norm2(ours.norm1(x))
        torch.testing.assert_close(ours(x), expected)
        assert not torch.allclose(ours.eval()(x), expected)


def test_dropout_sites_can_be_changed_one_by_one() -> None:
    _, ours = pair("encoder", dropout=0.0)
    (x,) = inputs("encoder")
    ours.dropout2.p = 1.0
    attended = ours.norm1(x + ours.self_attn(x, x, x)[0])
    torch.testing.assert_close(ours(x), ours.norm2(attended))


@pytest.mark.parametrize("kind", LAYERS)
def test_children_are_called_as_modules(kind: str) -> None:
    _, ours = pair(kind)
    expected = ours(*inputs(kind))
    calls = []
    names = [name for name, _ in ours.named_modules() if name]
    for name in names:
        ours.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: calls.append(name)
        )
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(*inputs(kind)), expected)
    assert sorted(calls) == sorted(names)


def test_replaced_children_act() -> None:
    _, ours = pair("encoder")
    (x,) = inputs("encoder")
    for name in ("norm1", "norm2"):
        setattr(ours, name, nn.Identity())
    attended = x + ours.self_attn(x, x, x)[0]
    expected = attended + ours.linear2(F.relu(ours.linear1(attended)))
    torch.testing.assert_close(ours(x), expected)
    ours.linear1 = nn.Sequential(ours.linear1, nn.Identity())
    torch.testing.assert_close(ours(x), expected)
    ours.norm1 = nn.RMSNorm(E)
    assert ours(x).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_runs_in_eval() -> None:
    """torch.nn's inference path reads linear1.weight, which is a method by then."""
    _, ours = pair("encoder")
    (x,) = inputs("encoder")
    expected = ours(x)
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(ours).eval(), {nn.Linear})
    assert type(quantized[0].linear1) is not nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(quantized[0](x), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_pickles(kind: str) -> None:
    _, ours = pair(kind)
    expected = ours(*inputs(kind))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is LAYERS[kind]
        assert torch.equal(other(*inputs(kind)), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_keep_an_activation_that_is_a_module(kind: str) -> None:
    """torch.nn's decoder layer has relu instead in every copy, and so in every stack."""
    _, ours = pair(kind, activation=nn.GELU(approximate="tanh"))
    expected = ours(*inputs(kind))
    stack = FusedTransformerEncoder if kind == "encoder" else FusedTransformerDecoder
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), stack(ours, 1)):
        assert torch.equal(other(*inputs(kind)), expected)


def test_state_without_activation_gets_relu() -> None:
    for kind, cls in LAYERS.items():
        _, ours = pair(kind)
        state = ours.__dict__.copy()
        del state["activation"]
        old = cls.__new__(cls)
        old.__setstate__(state)
        assert torch.equal(old(*inputs(kind)), ours(*inputs(kind)))


def test_checkpointing_repeats_every_dropout() -> None:
    _, ours = pair("encoder", dropout=0.5)
    (x,) = inputs("encoder")
    grads = []
    for wrap in (False, True):
        torch.manual_seed(4)
        ours.zero_grad()
        run = functools.partial(torch.utils.checkpoint.checkpoint, ours, use_reentrant=False)
        out = (run if wrap else ours)(x)
        out.sin().sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    torch.testing.assert_close(*grads)


class Copies(TorchDispatchMode):
    """Counts the operators that copy an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_):
            self.count += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_heads_are_split_and_merged_with_one_copy_at_most(kind: str, batch_first: bool) -> None:
    """Sequence-first: one for each attention, of its output; batch-first: none."""
    _, ours = pair(kind, batch_first=batch_first)
    tensors = [x if batch_first else x.transpose(0, 1).contiguous() for x in inputs(kind)]
    with torch.no_grad(), Copies() as copies:
        ours(*tensors)
    attentions = 1 if kind == "encoder" else 2
    assert copies.count <= (0 if batch_first else attentions)


def test_layers_of_others_get_masks_as_torch_hands_them_on() -> None:
    seen = {}

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
            seen.update(masks)
            return x

    encoder = FusedTransformerEncoder(Foreign(), 1, enable_nested_tensor=False)
    mask = torch.zeros(L, L, dtype=torch.bool).fill_diagonal_(True)
    encoder(torch.randn(N, L, E), mask=mask, src_key_padding_mask=torch.zeros(N, L) > 0)
    assert seen["src_mask"].dtype == seen["src_key_padding_mask"].dtype == torch.float32
    assert torch.equal(seen["src_mask"] == -torch.inf, mask)
    assert seen["is_causal"] is False


def test_encoder_and_decoder_of_stock_layers_agree_with_torch() -> None:
    x, memory = inputs("decoder")
    stock = nn.TransformerEncoder(pair("encoder")[0], 2, nn.LayerNorm(E))
    ours = FusedTransformerEncoder(pair("encoder")[1], 2, nn.LayerNorm(E))
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), stock(x))
    stock = nn.TransformerDecoder(pair("decoder")[0], 2, nn.LayerNorm(E))
    ours = FusedTransformerDecoder(pair("decoder")[1], 2, nn.LayerNorm(E))
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours(x, memory), stock(x, memory))


def test_errors_have_torch_types() -> None:
    model = FusedTransformer(E, H, 1, 1, FF, batch_first=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, S, E), torch.randn(3, L, E))
    with pytest.raises(RuntimeError):
        model(torch.randn(N, S, E + 1), torch.randn(N, L, E))
    (x,) = inputs("encoder")
    for cls in (nn.TransformerEncoder, FusedTransformerEncoder):
        encoder = cls(pair("encoder")[0 if cls is nn.TransformerEncoder else 1], 1)
        with pytest.raises(AssertionError):
            encoder(x, src_key_padding_mask=torch.zeros(N, L, dtype=torch.uint8))
        with pytest.raises(AssertionError):
            encoder(x, src_key_padding_mask=torch.zeros(N, S, dtype=torch.bool))
        with pytest.raises(RuntimeError):
            encoder(x, mask=torch.zeros(L, S, dtype=torch.bool))


def test_fuse_covers_a_model_built_of_stock_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, E)
            self.encoder = nn.TransformerEncoder(pair("encoder")[0], 2, nn.LayerNorm(E))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.encoder(self.embedding(tokens))

    model = Model()
    tokens = torch.randint(10, (N, L))
    expected = model(tokens)
    report = fuse(model)
    assert len(report.swapped) == 1 + 1 + 2 * (1 + 1 + 2)
    torch.testing.assert_close(model(tokens), expected)
