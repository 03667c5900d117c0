"""The feed-forward of the layers: one operation of bias, activation and dropout where it may be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fused_attn import FusedTransformerDecoderLayer, FusedTransformerEncoderLayer
from fused_attn.modules import feed_forward as module
from fused_attn.testing import assert_within_budget, gradients

pytestmark = pytest.mark.usefixtures("one_thread")

N, L, E, H, FF = 3, 5, 16, 4, 40
Layer = FusedTransformerEncoderLayer | FusedTransformerDecoderLayer

KNOWN = {
    "F.relu": F.relu, "torch.relu": torch.relu, "F.gelu": F.gelu, "F.silu": F.silu,
    "relu": "relu", "gelu": "gelu", "ReLU": nn.ReLU(), "GELU": nn.GELU(), "SiLU": nn.SiLU(),
    "tanh GELU": nn.GELU(approximate="tanh"), "ReLU in place": nn.ReLU(inplace=True),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(activation, dropout_p, in place) of each call of the fused operation."""
    seen: list[tuple] = []
    real = module.bias_activation

    def record(x: Tensor, bias: Tensor | None, *, activation: str, dropout_p: float, out, **more):
        seen.append((activation, dropout_p, out is x))
        return real(x, bias, activation=activation, dropout_p=dropout_p, out=out, **more)

    monkeypatch.setattr(module, "bias_activation", record)
    monkeypatch.setattr(module, "_has_kernel", lambda *_: True)  # the reference will do, too
    return seen


def layer(activation: str | Callable = "gelu", **settings) -> FusedTransformerEncoderLayer:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, **settings}
    return FusedTransformerEncoderLayer(E, H, FF, activation=activation, **settings)


def by_modules(ours: FusedTransformerEncoderLayer, x: Tensor) -> Tensor:
    return ours.linear2(ours.dropout(ours.activation(ours.linear1(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_known_activations_are_fused_within_the_error_budget(
    calls: list[tuple], name: str, bias: bool, dtype: torch.dtype
) -> None:
    ours = layer(KNOWN[name], bias=bias, dtype=dtype)
    x = torch.randn(N, L, E).to(dtype)
    outputs, grads = [], []
    exact = copy.deepcopy(ours).double()
    names = ("linear1.weight", "linear1.bias", "linear2.weight")
    for run, model, source in (
        (ours._feed_forward, ours, x),
        (lambda x: by_modules(ours, x), ours, x),
        (lambda x: by_modules(exact, x), exact, x.double()),
    ):
        out = run(source)
        wanted = [p for n, p in model.named_parameters() if n in names]
        outputs.append(out)
        grads.append(torch.cat([g.flatten() for g in gradients([out], wanted)]))
    assert len(calls) == 1
    assert_within_budget("output", *outputs)
    assert_within_budget("gradients", *grads, factor=3.0)


def test_exact_and_tanh_gelu_are_told_apart(calls: list[tuple]) -> None:
    for name, expected in (("GELU", "gelu"), ("tanh GELU", "gelu_tanh"), ("SiLU", "silu")):
        layer(KNOWN[name])(torch.randn(N, L, E))
        assert calls.pop()[0] == expected


def test_inference_writes_over_the_product_and_nothing_else(calls: list[tuple]) -> None:
    ours = layer()
    x = torch.randn(N, L, E)
    before = {name: p.clone() for name, p in ours.named_parameters()} | {"x": x.clone()}
    expected = ours._feed_forward(x).detach()
    with torch.no_grad():
        assert torch.equal(ours._feed_forward(x), expected)
    with torch.inference_mode():
        assert torch.equal(ours._feed_forward(x), expected)
    assert [in_place for _, _, in_place in calls] == [False, True, True]
    for name, p in [*ours.named_parameters(), ("x", x)]:
        assert torch.equal(p, before[name]), name
    ours.requires_grad_(False)
    assert torch.equal(ours._feed_forward(x), expected)
    ours.linear1.bias.requires_grad_()
    ours._feed_forward(x)
    assert [in_place for _, _, in_place in calls[3:]] == [True, False]


def hooked(ours: Layer) -> None:
    ours.linear1.register_forward_hook(lambda *_: None)


def replaced(ours: Layer) -> None:
    ours.linear1 = nn.Sequential(ours.linear1)


def parametrized(ours: Layer) -> None:
    parametrizations.weight_norm(ours.linear1)


def pruned(ours: Layer) -> None:
    prune.l1_unstructured(ours.linear1, "weight", 0.5)


def hooked_activation(ours: Layer) -> None:
    ours.activation.register_forward_hook(lambda *_: None)


def replaced_forward(ours: Layer) -> None:
    ours.linear1.forward = ours.linear1.forward


def other_subclass(ours: Layer) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    ours.linear1.__class__ = Adapted


@pytest.mark.parametrize("change", [
    hooked, replaced, parametrized, pruned, hooked_activation, replaced_forward, other_subclass,
])  # fmt: skip
@pytest.mark.parametrize("cls", [FusedTransformerEncoderLayer, FusedTransformerDecoderLayer])
def test_what_is_not_plain_is_called_as_the_module_that_it_is(
    calls: list[tuple], cls: type, change: Callable[[Layer], None]
) -> None:
    ours = cls(E, H, FF, 0.0, nn.GELU(), batch_first=True)
    change(ours)
    x = torch.randn(N, L, E)
    torch.testing.assert_close(ours._feed_forward(x), by_modules(ours, x))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()._feed_forward(x), by_modules(ours, x))
    assert calls == []


@pytest.mark.parametrize("activation", [torch.tanh, lambda x: x * x, nn.LeakyReLU(), nn.ReLU6()])
def test_unknown_activations_run_as_given(calls: list[tuple], activation: Callable) -> None:
    ours, x = layer(activation), torch.randn(N, L, E)
    assert torch.equal(ours._feed_forward(x), by_modules(ours, x))
    assert calls == []


def test_dropout_is_part_of_the_operation_unless_it_is_another_module(calls: list[tuple]) -> None:
    ours, x = layer(dropout=0.5), torch.randn(N, L, E)
    ours(x)
    ours.eval()(x)
    ours.train()
    ours.dropout = nn.Identity()
    ours(x)
    ours.dropout = nn.Dropout(0.3)
    seen = []
    ours.dropout.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ours(x)
    assert [p for _, p, _ in calls] == [0.5, 0.0, 0.0, 0.0]
    assert seen == [(N, L, FF)]


def test_dropped_features_do_not_reach_linear2() -> None:
    ours = layer("relu", dropout=0.9)
    with torch.no_grad():
        ours.linear1.weight.zero_()
        ours.linear1.bias.fill_(1.0)
        ours.linear2.weight.fill_(1.0)
        ours.linear2.bias.zero_()
    kept = ours._feed_forward(torch.randn(200, 10, E))[..., 0] / 10.0  # number of ones, 1 / (1 - p)
    torch.testing.assert_close(kept, kept.round())
    assert abs(float(kept.detach().mean()) / FF - 0.1) < 0.01


@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_its_dtypes(calls: list[tuple], training: bool) -> None:
    ours = layer().train(training)
    x = torch.randn(N, L, E)
    expected = by_modules(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours._feed_forward(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.linear1.parameters())
    assert len(calls) == 1


def test_a_wrong_dtype_raises_as_torch() -> None:
    with pytest.raises(RuntimeError):
        layer()._feed_forward(torch.randn(N, L, E).bfloat16())


def test_meta_and_per_sample_gradients(calls: list[tuple]) -> None:
    ours, x = layer(), torch.randn(N, L, E)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x[None],)).sin().sum()

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    ours(x).sin().sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).is_meta


@pytest.mark.parametrize("training", [True, False])
def test_compiled_layer_agrees(training: bool) -> None:
    torch._dynamo.reset()
    ours, x = layer("relu").train(training), torch.randn(N, L, E)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), ours(x))
