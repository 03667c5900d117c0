"""Modules of other libraries that `fuse` knows by their code: the same answers, put back whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("transformers")

from fused_attn import fuse, unfuse
from fused_attn.modules import foreign, linear
from fused_attn.modules.foreign import linears as foreign_linears
from fused_attn.modules.foreign.formula import formula_of
from tests.cases import transformers_models as zoo
from tests.cases.calls import counted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return counted(monkeypatch)


# Model, and the classes of it that are swapped.
MODELS = {
    "Llama": {"LlamaRMSNorm", "LlamaMLP"},
    "Gemma 2": {"Gemma2RMSNorm", "Gemma2MLP"},
    "T5": {"T5LayerNorm", "T5DenseActDense"},
    "BERT": {
        "LayerNorm", "BertIntermediate", "BertSelfOutput", "BertOutput",
        "BertPredictionHeadTransform",
    },
    "GPT-2": {"LayerNorm", "GPT2MLP"},
    "Phi-3": {"Phi3RMSNorm", "Phi3MLP"},
    "ModernBERT": {"LayerNorm", "ModernBertMLP", "ModernBertPredictionHead"},
    "Llama 4, chunks": {"Llama4TextRMSNorm", "Llama4TextL2Norm", "Llama4TextMLP"},
    "GPT-NeoX": {"LayerNorm", "GPTNeoXMLP"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, calls: list[str]) -> None:
    model = zoo.make(name)
    stock = copy.deepcopy(model)
    report = fuse(model)
    assert {swap.before for swap in report.swapped} == MODELS[name]
    attention = [x for x in report.left_alone if "Attention" in x.kind]
    assert attention
    assert all("fused_attn.integrations.transformers" in x.reason for x in attention)
    assert list(model.state_dict()) == list(stock.state_dict())
    found, gradients = zoo.logits_and_gradients(name, model, "right")
    assert set(calls) == {"norm", "activation"}
    expected, expected_gradients = zoo.logits_and_gradients(name, stock, "right")
    assert zoo.difference(found, expected) <= zoo.LIMIT
    largest = max(g.abs().max() for g in expected_gradients)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert (mine - theirs).abs().max() <= zoo.LIMIT * largest
    with torch.no_grad():  # in which products are written to their halves
        assert zoo.difference(zoo.logits(model, zoo.inputs(name)), expected) <= zoo.LIMIT
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linears_whose_weight_is_transposed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's Conv1D: with `linears=True` its products are ours where ours are faster."""
    model = zoo.make("GPT-2").to(dtype)
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = fuse(model, linears=True)
    kinds = [swap.before for swap in report.swapped]
    assert kinds.count("Conv1D") == 8
    assert "Linear" in kinds
    products: list[int] = []

    def project(*given: Tensor) -> Tensor:
        products.append(1)
        return linear.project(*given)

    monkeypatch.setattr(foreign_linears, "project", project)
    found = zoo.logits(model, zoo.inputs("GPT-2"))
    assert len(products) >= 6  # a feed-forward calls its first one itself
    true = zoo.logits(exact, zoo.inputs("GPT-2"))
    errors = [
        float((x.double() - true).detach().norm())
        for x in (found, zoo.logits(stock, zoo.inputs("GPT-2")))
    ]
    assert errors[0] <= 2 * errors[1] + 1e-6
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_a_hook_on_such_a_linear_is_called() -> None:
    model = zoo.make("GPT-2")
    fuse(model, linears=True)
    seen = []
    for block in model.transformer.h:
        for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            part.register_forward_hook(lambda *_: seen.append(1))
    zoo.logits(model, zoo.inputs("GPT-2"))
    assert len(seen) == 4 * len(model.transformer.h)


def test_trained_weights_stay_and_the_optimizer_never_notices() -> None:
    model = zoo.make("Llama")
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse(model)
    model(**zoo.inputs("Llama")).logits.sin().sum().backward()
    optimizer.step()
    expected = zoo.logits(model, zoo.inputs("Llama"))
    unfuse(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert zoo.difference(zoo.logits(model, zoo.inputs("Llama")), expected) <= zoo.LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "T5"])
def test_sixteen_bit_norms_and_feed_forwards_are_as_near_to_float64(
    name: str, dtype: torch.dtype
) -> None:
    model = zoo.make(name)
    for part in model.modules():
        if not type(part).__name__.endswith(("Norm", "MLP", "DenseActDense")):
            continue
        part.requires_grad_(False)
        exact = copy.deepcopy(part).double()
        theirs, mine = copy.deepcopy(part).to(dtype), copy.deepcopy(part).to(dtype)
        x = torch.randn(6, zoo.WIDTH, dtype=dtype)
        fuse(mine)
        expected = exact(x.double())
        errors = [float((m(x).double() - expected).norm()) for m in (mine, theirs)]
        assert mine(x).dtype == theirs(x).dtype == dtype
        assert errors[0] <= 2 * errors[1] + 1e-6


def test_where_the_result_would_have_another_dtype_theirs_runs(calls: list[str]) -> None:
    """Llama's norm of bfloat16 with a float32 weight is float32."""
    norm = zoo.make("Llama").model.norm
    x = torch.randn(3, zoo.WIDTH, dtype=torch.bfloat16)
    expected = norm(x)
    fuse(norm)
    assert norm(x).dtype == expected.dtype == torch.float32
    assert torch.equal(norm(x), expected)
    assert calls == []
    norm(hidden_states=x.float())
    assert calls == ["norm"]


def test_hooks_parametrizations_copies_and_pickles() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    model = zoo.make("Llama").model.layers[0].mlp
    parametrize.register_parametrization(model.gate_proj, "weight", Doubled())
    norm = zoo.make("Llama").model.norm
    parametrize.register_parametrization(norm, "weight", Doubled())
    seen: list[str] = []
    for module in (model, model.up_proj, norm):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    x = torch.randn(2, zoo.WIDTH)
    expected = [model(x), norm(x)]
    fuse(model)
    fuse(norm)
    seen.clear()
    for found, wanted in zip([model(x), norm(x)], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert seen[:2] == ["Linear", "FusedLlamaMLP"]
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm).__name__ == "FusedLlamaRMSNorm"

    whole = zoo.make("Llama")
    fuse(whole)
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in whole.modules()]
        with torch.no_grad():
            given = zoo.inputs("Llama")
            assert torch.equal(zoo.logits(twin, given), zoo.logits(whole, given))
        unfuse(twin)
        assert type(twin.model.norm).__name__ == "LlamaRMSNorm"


def test_dropout_in_training_repeats_with_the_seed() -> None:
    model = zoo.make("BERT").train()
    fuse(model)
    given = zoo.inputs("BERT")
    torch.manual_seed(3)
    first, second = zoo.logits(model, given), zoo.logits(model, given)
    torch.manual_seed(3)
    assert torch.equal(zoo.logits(model, given), first)
    assert not torch.equal(first, second)


def test_one_graph_under_the_compiler() -> None:
    torch._dynamo.reset()
    model = zoo.make("Llama")
    fuse(model)
    given = zoo.inputs("Llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert zoo.difference(zoo.logits(compiled, given), zoo.logits(model, given)) <= zoo.LIMIT


class OwnNorm(nn.Module):
    """Almost Llama's: the mean is of absolute values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.abs().mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class CopiedNorm(OwnNorm):
    """Llama's under other names, in two methods: known by what it computes."""

    def _normed(self, rows: Tensor) -> Tensor:
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, rows: Tensor) -> Tensor:
        """With a docstring."""
        kind = rows.dtype
        rows = self._normed(rows.to(torch.float32))
        return self.weight * rows.to(kind)


class OwnAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, -1) @ x


class TorchAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_the_same_code_elsewhere_is_known_and_other_code_is_named(calls: list[str]) -> None:
    model = nn.ModuleDict({
        "copied": CopiedNorm(), "own": OwnNorm(), "attention": OwnAttention(),
        "torch": TorchAttention(),
    })  # fmt: skip
    x = torch.randn(3, 16)
    expected = model["copied"](x)
    report = fuse(model)
    assert [swap.name for swap in report.swapped] == ["copied"]
    torch.testing.assert_close(model["copied"](x), expected)
    assert calls == ["norm"]
    reasons = {x.name: x.reason for x in report.left_alone}
    assert "`fuse.register(OwnNorm, ...)`" in reasons["own"]
    assert "computes attention itself" in reasons["attention"]
    assert "torch_sdpa" in reasons["torch"]


class Decorated(CopiedNorm):
    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        kind = rows.dtype
        rows = self._normed(rows.to(torch.float32))
        return self.weight * rows.to(kind)


class Looping(CopiedNorm):
    def forward(self, rows: Tensor) -> Tensor:
        for _ in range(2):
            rows = self._normed(rows)
        return rows


class InPlace(CopiedNorm):
    def forward(self, rows: Tensor) -> Tensor:
        rows += 1.0
        return self._normed(rows)


class Overridden(CopiedNorm):
    def _normed(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("cls", [Decorated, Looping, InPlace, Overridden])
def test_code_that_does_more_has_another_formula_or_none(cls: type) -> None:
    known = formula_of(CopiedNorm)
    assert known is not None
    assert known.attributes == ("weight", "variance_epsilon")
    assert formula_of(cls) != known
    assert not fuse(cls()).swapped


def test_long_lists_are_folded_in_print() -> None:
    report = fuse(nn.ModuleList([OwnNorm() for _ in range(9)]))
    assert len(report.left_alone) == 9
    assert "  0 and 8 more: OwnNorm left alone: " in str(report)
    assert len(str(report).splitlines()) == 2


class FusedOwnNorm(OwnNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 3.0


@pytest.fixture
def nothing_registered() -> Iterator[None]:
    yield
    foreign.REGISTERED.clear()


@pytest.mark.usefixtures("nothing_registered")
def test_classes_of_ones_own_are_registered() -> None:
    model = nn.ModuleList([OwnNorm(), OwnNorm()])
    model[1].weight.data.zero_()
    fuse.register(OwnNorm, FusedOwnNorm)
    assert [swap.after for swap in fuse(model).swapped] == ["FusedOwnNorm"] * 2
    assert torch.equal(model[0](torch.ones(2)), torch.full((2,), 3.0))
    unfuse(model)
    assert type(model[0]) is OwnNorm

    fuse.register(OwnNorm, lambda norm: FusedOwnNorm if norm.weight.any() else "its weight is 0")
    report = fuse(model)
    assert [swap.name for swap in report.swapped] == ["0"]
    assert [(x.name, x.reason) for x in report.left_alone] == [("1", "its weight is 0")]
    unfuse(model)
    fuse.register(OwnNorm, None)
    assert not fuse(model).swapped


@pytest.mark.usefixtures("nothing_registered")
def test_registering_something_else_is_refused() -> None:
    for cls, converter, text in (
        (int, FusedOwnNorm, "`cls` must be a class of modules"),
        (OwnNorm, nn.Linear, "subclass of OwnNorm, got .*Linear"),
        (OwnNorm, 3, "`converter` must be a subclass of OwnNorm or a function"),
    ):
        with pytest.raises(TypeError, match=text):
            fuse.register(cls, converter)
    fuse.register(OwnNorm, lambda norm: FusedOwnNorm())
    with pytest.raises(TypeError, match="must return a subclass of it, a sentence or None, got"):
        fuse(OwnNorm())
