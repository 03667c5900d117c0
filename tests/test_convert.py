"""fuse and unfuse: what is swapped, what is left alone and why, and what must survive."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_attn import FusedMultiheadAttention, FusedRMSNorm, fuse, unfuse
from fused_attn.modules import DROP_INS
from fused_attn.ops.attention import call

pytestmark = pytest.mark.usefixtures("one_thread")

N, L, E, H = 3, 5, 16, 4


def transformer(**settings) -> nn.Transformer:
    settings = {"dropout": 0.0, "batch_first": True, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Transformer(E, H, 2, 2, 32, **settings)


def stock_answer(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """torch.nn's training path, which is right where a row sees a key; fuse never changes it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each attention call that goes through our core."""
    calls = []
    original = call.run

    def counting(*args, **kwargs):
        calls.append("attention")
        return original(*args, **kwargs)

    monkeypatch.setattr(call, "run", counting)
    return calls


def test_every_stock_class_is_swapped_and_put_back() -> None:
    model = transformer()
    before = {name: type(module) for name, module in model.named_modules()}
    report = fuse(model)
    after = {name: type(module) for name, module in model.named_modules()}
    for name, cls in before.items():
        assert after[name] is DROP_INS.get(cls, cls), name
    swapped = {name for name, cls in before.items() if cls in DROP_INS}
    assert {s.name for s in report.swapped} == swapped
    assert report.left_alone == ()
    back = unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {s.name for s in back.swapped} == swapped


def test_drop_ins_are_subclasses_with_the_same_constructor() -> None:
    import inspect

    for stock, fused in DROP_INS.items():
        assert issubclass(fused, stock)
        theirs = inspect.signature(stock.__init__).parameters.values()
        ours = inspect.signature(fused.__init__).parameters.values()
        ours = [p for p in ours if p.name not in ("rotary_base", "weight_offset")]
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ]


def test_fusing_twice_changes_nothing_more() -> None:
    model = transformer()
    fuse(model)
    report = fuse(model)
    assert report.swapped == ()
    assert report.left_alone == ()


def test_fused_twice_one_unfuse_takes_it_all_back() -> None:
    model = transformer()
    before = {name: type(module) for name, module in model.named_modules()}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    first = fuse(model)
    fuse(model)
    back = unfuse(model)
    assert {s.name for s in back.swapped} == {s.name for s in first.swapped}
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert unfuse(model).swapped == ()


def test_what_was_switched_off_is_put_back_once() -> None:
    class Own(nn.TransformerEncoderLayer):
        pass

    layer = Own(E, H, 32, batch_first=True)
    kept = layer.activation_relu_or_gelu
    fuse(layer)
    assert layer.activation_relu_or_gelu == 0
    unfuse(layer)
    assert layer.activation_relu_or_gelu == kept != 0
    layer.activation_relu_or_gelu = 0  # the user's own switch
    unfuse(layer)
    assert layer.activation_relu_or_gelu == 0


def test_the_model_itself_may_be_the_module() -> None:
    module = nn.MultiheadAttention(E, H)
    report = fuse(module)
    assert type(module) is FusedMultiheadAttention
    assert [(s.name, s.after) for s in report.swapped] == [("", "FusedMultiheadAttention")]
    assert "(model): MultiheadAttention -> FusedMultiheadAttention" in str(report)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_answers_are_those_of_torch(mode: str, norm_first: bool) -> None:
    model = transformer(norm_first=norm_first)
    src, tgt = torch.randn(N, L, E), torch.randn(N, 4, E)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    expected = stock_answer(model, src, tgt, tgt_mask=mask)
    fuse(model)
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        torch.testing.assert_close(model(src, tgt, tgt_mask=mask), expected)
    unfuse(model)
    torch.testing.assert_close(stock_answer(model, src, tgt, tgt_mask=mask), expected)


def test_parameters_and_optimizer_references_are_the_same_objects() -> None:
    model = transformer()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == list(state)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, state[name])
    out = model(torch.randn(N, L, E), torch.randn(N, L, E))
    (out * torch.randn(N, L, E)).sum().backward()
    optimizer.step()
    name = "encoder.layers.0.self_attn.in_proj_weight"
    assert not torch.equal(model.state_dict()[name], state[name])


def test_tied_weights_stay_tied_and_shared_modules_shared() -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    model = nn.ModuleDict({"a": attention, "b": attention, "c": nn.MultiheadAttention(E, H)})
    model["c"].out_proj.weight = attention.out_proj.weight
    fuse(model)
    assert model["a"] is model["b"]
    assert model["c"].out_proj.weight is model["a"].out_proj.weight


def test_hooks_survive_and_run() -> None:
    model = transformer()
    seen = []
    layer = model.encoder.layers[0]
    for module in (layer, layer.self_attn, layer.self_attn.out_proj, layer.norm1):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    fuse(model)
    with torch.no_grad():
        model.eval()(torch.randn(N, L, E), torch.randn(N, L, E))
    assert len(seen) == 4
    assert seen[-1] == "FusedTransformerEncoderLayer"


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def test_parametrized_modules_are_swapped_and_stay_parametrized() -> None:
    stock = nn.MultiheadAttention(E, H, batch_first=True)
    parametrize.register_parametrization(stock, "in_proj_weight", Doubled())
    x = torch.randn(N, L, E)
    expected = stock(x, x, x)
    twin = copy.deepcopy(stock)
    report = fuse(stock)
    assert len(report.swapped) == 1
    assert isinstance(stock, FusedMultiheadAttention)
    assert not isinstance(twin, FusedMultiheadAttention)
    torch.testing.assert_close(stock(x, x, x), expected)
    torch.testing.assert_close(copy.deepcopy(stock)(x, x, x), expected)
    parametrize.register_parametrization(stock, "in_proj_bias", Doubled())
    parametrize.remove_parametrizations(stock, "in_proj_bias")
    parametrize.remove_parametrizations(stock, "in_proj_weight")
    assert type(stock) is FusedMultiheadAttention
    parametrize.register_parametrization(stock, "in_proj_weight", Doubled())
    unfuse(stock)
    assert not isinstance(stock, FusedMultiheadAttention)
    parametrize.remove_parametrizations(stock, "in_proj_weight")
    assert type(stock) is nn.MultiheadAttention


class OwnAttention(nn.MultiheadAttention):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_alone_says_why() -> None:
    replaced = nn.MultiheadAttention(E, H)
    replaced.forward = lambda *args, **kwargs: "replaced"
    model = nn.ModuleDict({
        "own": OwnAttention(E, H),
        "quantizable": torch.ao.nn.quantizable.MultiheadAttention(E, H),
        "scripted": torch.jit.script(nn.MultiheadAttention(E, H)),
        "replaced": replaced,
        "skipped": nn.MultiheadAttention(E, H),
        "linear": nn.Linear(E, E),
    })  # fmt: skip
    report = fuse(model, skip="skip*")
    assert report.swapped == ()
    reasons = {m.name: m.reason for m in report.left_alone}
    assert "OwnAttention is a subclass of torch.nn.MultiheadAttention" in reasons["own"]
    assert "quantizable" in reasons["quantizable"]
    assert "scripted" in reasons["scripted"]
    assert "`forward` was replaced" in reasons["replaced"]
    assert "'skip*' in `skip`" in reasons["skipped"]
    assert set(reasons) == {"own", "quantizable", "scripted", "replaced", "skipped"}
    assert "own: OwnAttention left alone:" in str(report)


def test_skip_takes_classes_and_names() -> None:
    model = transformer()
    fuse(model, skip=[nn.TransformerDecoderLayer, "encoder.layers.1*"])
    assert type(model.decoder.layers[0]) is nn.TransformerDecoderLayer
    assert type(model.decoder.layers[0].self_attn) is FusedMultiheadAttention
    assert type(model.encoder.layers[1].self_attn) is nn.MultiheadAttention
    assert type(model.encoder.layers[0].self_attn) is FusedMultiheadAttention


@pytest.mark.parametrize("base", [nn.Module, nn.TransformerEncoderLayer])
def test_skip_by_a_base_class_means_its_subclasses_too(base: type[nn.Module]) -> None:
    """As isinstance has it: whoever skips all modules skips all."""
    model = transformer()
    fuse(model, skip=base)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    expected = FusedMultiheadAttention if base is not nn.Module else nn.MultiheadAttention
    assert type(model.encoder.layers[0].self_attn) is expected


@pytest.mark.parametrize("bad", [[3], [int], [None]])
def test_skip_refuses_other_things(bad: list) -> None:
    with pytest.raises(TypeError, match="`skip` must hold names and module classes"):
        fuse(transformer(), skip=bad)


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_model_must_be_a_module(function) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got dict"):
        function({})


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass that keeps torch's forward, with its inference fast path."""


def encoder(layer_class: type, **settings) -> nn.TransformerEncoder:
    layer = layer_class(E, H, 32, 0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("layer_class", [nn.TransformerEncoderLayer, OwnLayer])
@pytest.mark.parametrize("padded", [False, True])
def test_inference_runs_the_fused_attention(
    layer_class: type, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.nn's fast path reads the weights and calls neither attention nor norm."""
    model = encoder(layer_class).eval()
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None] if padded else None
    expected = stock_answer(model, x, src_key_padding_mask=padding)
    fuse(model)
    calls = counted(monkeypatch)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    real = torch.ones(N, L, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(out[real], expected[real])


def test_unfuse_restores_the_fast_path_of_a_subclass() -> None:
    model = encoder(OwnLayer)
    report = fuse(model)
    assert all(layer.activation_relu_or_gelu == 0 for layer in model.layers)
    reasons = [m.reason for m in report.left_alone]
    assert len(reasons) == 2
    assert all("its inference fast path is off" in reason for reason in reasons)
    unfuse(model)
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)
    assert not any("fused" in name for layer in model.layers for name in vars(layer))


class OwnEncoder(nn.TransformerEncoder):
    """A subclass that keeps torch's forward, which makes nested tensors in inference."""


def test_encoder_subclass_makes_no_nested_tensors_for_fused_layers() -> None:
    model = OwnEncoder(nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 2).eval()
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None]
    expected = stock_answer(model, x, src_key_padding_mask=padding)
    fuse(model)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding])
    unfuse(model)
    assert model.use_nested_tensor


def test_compiled_model_can_be_fused() -> None:
    torch._dynamo.reset()
    model = torch.compile(transformer().eval(), backend="eager")
    src, tgt = torch.randn(N, L, E), torch.randn(N, L, E)
    expected = model(src, tgt)
    fuse(model)
    torch.testing.assert_close(model(src, tgt), expected)


NO_EFFECT = {
    "misspelt pattern": ("decodr.*", "'decodr.*' in `skip` matches no module; hint: 'decoder.*'"),
    "misspelt name": ("encoder.layer.0", "matches no module; hint: 'encoder.layers.0'"),
    "other capitals": ("Decoder.*", "'Decoder.*' in `skip` matches no module; hint: 'decoder.*'"),
    "nothing like it": ("xyz", "'xyz' in `skip` matches no module"),
    "not the whole name": ("self_attn", "matches no module; hint: '*.self_attn'"),
    "nothing that is swapped": ("*.linear1", "matches only modules that are not swapped anyway"),
    "the model's own empty name": ("", ""),
    "a class that is not there": (nn.RMSNorm, "RMSNorm in `skip` matches no module"),
    "a class that is not swapped": (nn.Linear, "Linear in `skip` matches only modules"),
}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_has_no_effect_is_a_warning_in_the_report(name: str) -> None:
    item, text = NO_EFFECT[name]
    report = fuse(transformer(), skip=[item, "encoder.norm"])
    assert len(report.warnings) == (1 if text else 0)
    for warning in report.warnings:
        assert text in warning
        assert f"  warning: {warning}" in str(report)
    assert len(report.left_alone) == (1 if text else 2)


def test_prefixes_of_wrappers_are_hinted_at() -> None:
    [warning] = fuse(nn.ModuleDict({"module": transformer()}), skip="decoder.*").warnings
    assert warning == "'decoder.*' in `skip` matches no module; hint: '*.decoder.*'"


def test_skip_that_has_an_effect_is_no_warning_even_if_another_item_comes_first() -> None:
    report = fuse(transformer(), skip=["decoder*", nn.TransformerDecoderLayer])
    assert report.warnings == ()
    assert "warning" not in str(report)


def test_models_with_nothing_to_swap_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert "the model has no module to swap; known are MultiheadAttention" in str(fuse(model))
    assert unfuse(model).warnings == ("Sequential holds no module of fused_attn",)
    model = transformer()
    assert fuse(model).warnings == ()
    assert "nothing more to swap" in fuse(model).warnings[0]
    assert unfuse(model).warnings == ()
    assert len(unfuse(model).warnings) == 1


def test_what_torch_lacks_stays_fused() -> None:
    model = nn.ModuleDict({
        "offset": FusedRMSNorm(E, weight_offset=1.0),
        "plain": FusedRMSNorm(E),
        "rotary": FusedMultiheadAttention(E, H, rotary_base=10000.0),
    })  # fmt: skip
    report = unfuse(model)
    assert [swap.name for swap in report.swapped] == ["plain"]
    assert {x.name: x.reason for x in report.left_alone} == {
        "offset": "torch.nn has no norm with a `weight_offset`",
        "rotary": "torch.nn has no rotary position embedding",
    }
    assert type(model["offset"]) is FusedRMSNorm
