"""The contract with torch.nn, line by line: one short test for each promise.

The long tests of each line are in the files of the modules; the faults of others that must not be
ours are in test_faults.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_attn import FusedTransformer
from fused_attn.modules import DROP_INS
from fused_attn.runtime import native
from tests.cases.contract import FF, MODES, E, H, L, N, S, attention, batch, in_mode, transformer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested", "ignore:The PyTorch API of nested"),
]

ARGUMENTS = {
    nn.MultiheadAttention: (E, H),
    nn.LayerNorm: (E,),
    nn.RMSNorm: (E,),
    nn.TransformerEncoderLayer: (E, H, FF),
    nn.TransformerDecoderLayer: (E, H, FF),
    nn.Transformer: (E, H, 1, 1, FF),
}


@pytest.mark.parametrize("stock", ARGUMENTS)
def test_same_constructor_children_state_dict_and_weights_for_one_seed(stock: type) -> None:
    torch.manual_seed(5)
    theirs = stock(*ARGUMENTS[stock])
    torch.manual_seed(5)
    ours = DROP_INS[stock](*ARGUMENTS[stock])
    assert isinstance(ours, stock)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator.overloadpacket))
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_is_four_products_and_our_operations(norm_first: bool, training: bool) -> None:
    """Residual, dropout and norm are one operation; so are bias, activation and dropout."""
    layer = transformer(norm_first=norm_first, dropout=0.1).encoder.layers[0].train(training)
    with torch.set_grad_enabled(training), Operators() as seen:
        layer(batch()[0])
    ours = [name for name in seen.names if name.startswith("fused_attn.")]
    norms = ["fused_attn.layer_norm_forward"]
    attend, activate = "fused_attn.attention_forward", "fused_attn.bias_activation_forward"
    expected = (
        [*norms, attend, *norms, activate] if norm_first else [attend, *norms, activate, *norms]
    )
    assert ours == expected
    products = [name for name in seen.names if name in ("aten.addmm", "aten.mm", "aten.linear")]
    assert len(products) == 4
    left = {"aten.native_layer_norm", "aten.relu", "aten.threshold", "aten.softmax", "aten.bmm"}
    assert not left & set(seen.names)
    if not norm_first:
        assert not {"aten.add", "aten.native_dropout", "aten.bernoulli_"} & set(seen.names)


@pytest.mark.parametrize("activation", [F.relu, nn.GELU(approximate="tanh"), torch.tanh])
@pytest.mark.parametrize("mode", MODES)
def test_any_activation_runs_as_given(mode: str, activation: Callable[[Tensor], Tensor]) -> None:
    layer, x = transformer(activation=activation).encoder.layers[0], batch()[0]
    h = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
    expected = layer.norm2(h + layer.linear2(activation(layer.linear1(h))))
    torch.testing.assert_close(in_mode(layer, mode, x), expected)


MASKS = {
    "bool 2-D": lambda: torch.rand(L, S) < 0.3,
    "float 3-D": lambda: torch.randn(N * H, L, S),
    "float 4-D": lambda: torch.randn(N, 1, 1, S),
    "bool 4-D": lambda: torch.rand(1, H, L, S) < 0.3,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_beside_float_padding(
    kind: str, need_weights: bool, dtype: torch.dtype
) -> None:
    """A float32 mask with a half-precision query too; gradients to float masks, in their dtype."""
    module, (memory, x) = attention(dtype=dtype), batch(dtype)
    mask, padding = MASKS[kind](), torch.randn(N, S, requires_grad=True)
    if mask.is_floating_point():
        mask.requires_grad_()
    arguments = {"key_padding_mask": padding, "attn_mask": mask}
    out, _ = module(x, memory, memory, need_weights=need_weights, **arguments)
    full = torch.zeros(N, H, L, S)
    four = mask.unflatten(0, (N, H)) if mask.dim() == 3 else mask
    full = full.masked_fill(four, -torch.inf) if mask.dtype == torch.bool else full + four
    full = full + padding[:, None, None]
    q, k, v = (
        t.unflatten(-1, (H, -1)).transpose(1, 2).float() for t in module._project(x, memory, memory)
    )
    heads = F.scaled_dot_product_attention(q, k, v, full).transpose(1, 2).flatten(2)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(out, module.out_proj(heads.to(dtype)), **tolerance)
    out.float().sin().sum().backward()
    for given in (padding, mask):
        if given.is_floating_point():
            assert given.grad.dtype == torch.float32
            assert float(given.grad.abs().max()) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_the_causal_hint_is_obeyed_alike_in_every_mode(settings: dict, mode: str) -> None:
    module, (_, x) = attention(**settings), batch()
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    expected = module(x, x, x, attn_mask=mask, need_weights=False)[0]
    for given in (None, mask):
        out = in_mode(module, mode, x, x, x, attn_mask=given, is_causal=True, need_weights=False)
        torch.testing.assert_close(out[0], expected)


def test_the_causal_hint_reads_nothing_back_from_the_device() -> None:
    """A dispatch mode sees the operators that wait for a device."""
    model, (src, tgt) = transformer(), batch()
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    with Operators() as seen:
        model(src, tgt, tgt_mask=mask, tgt_is_causal=True)
        model(src, tgt, tgt_mask=mask)
    waiting = {"aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero"}
    assert not waiting & set(seen.names)


@pytest.mark.parametrize("mode", MODES)
def test_a_fully_masked_row_is_zero_with_finite_gradients(mode: str) -> None:
    module, (memory, x) = attention(), batch()
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    out, weights = in_mode(module, mode, x, memory, memory, key_padding_mask=padding)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(L, E))
    assert torch.equal(weights[1], torch.zeros(L, S))
    if mode in ("train", "eval", "compiled"):
        (out.sin().sum() + weights.sin().sum()).backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_padding_costs_nothing_and_changes_no_token(training: bool) -> None:
    model, (src, tgt) = transformer().train(training), batch()
    rows = []

    def count(x: Tensor) -> Tensor:
        rows.append(x.numel() // FF)
        return F.relu(x)

    count.token_wise = True
    for block in (model.encoder.layers[0], model.decoder.layers[0]):
        block.activation = count
    hidden = torch.arange(S) >= torch.tensor([S, 3, 1])[:, None]
    hidden_tgt = torch.arange(L) >= torch.tensor([2, L, 4])[:, None]
    out = model(
        src, tgt, src_key_padding_mask=hidden, tgt_key_padding_mask=hidden_tgt,
        memory_key_padding_mask=hidden, tgt_is_causal=True,
    )  # fmt: skip
    assert rows == [S + 3 + 1, 2 + L + 4]  # once each: of the first layers
    for n in range(N):
        alone = model(src[n][~hidden[n]], tgt[n][~hidden_tgt[n]], tgt_is_causal=True)
        torch.testing.assert_close(out[n][~hidden_tgt[n]], alone)


def test_nested_tensors_strided_from_torch_s_encoder_and_jagged_in_training() -> None:
    layer, x = transformer().encoder.layers[0], batch()[0]
    hidden = torch.arange(S) >= torch.tensor([S, 3, 1])[:, None]
    stock = nn.TransformerEncoder(copy.deepcopy(layer), 1)
    assert stock.use_nested_tensor  # its inference path hands the layer strided ones
    with torch.no_grad():
        inferred = stock.eval()(x, src_key_padding_mask=hidden)
    parts = [x[n][~hidden[n]].requires_grad_() for n in range(N)]
    out = layer.train()(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
    torch.testing.assert_close(out.values(), inferred[~hidden])
    out.values().sum().backward()
    assert all(part.grad is not None for part in parts)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Tensor) -> Tensor:
        self.calls += 1
        return 2.0 * self.inner(*args)


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("name", ["self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"])
def test_what_is_not_plain_is_called_as_a_module(name: str, mode: str) -> None:
    x = batch()[0]
    layer = transformer().encoder.layers[0]
    plain = in_mode(layer, mode, x)
    parent, _, child = name.rpartition(".")
    wrapped = Wrapped(layer.get_submodule(name))
    setattr(layer.get_submodule(parent), child, wrapped)
    assert not torch.allclose(in_mode(layer, mode, x), plain)
    assert wrapped.calls == 1
    setattr(layer.get_submodule(parent), child, wrapped.inner)
    seen = []
    wrapped.inner.register_forward_hook(lambda *_: seen.append(name))
    torch.testing.assert_close(in_mode(layer, mode, x), plain)
    assert seen == [name]


def test_no_weight_is_cached() -> None:
    model, inputs = transformer(), batch()
    model(*inputs)
    other = FusedTransformer(E, H, 2, 2, FF, 0.0, batch_first=True)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    assert torch.equal(model(*inputs), other(*inputs))


def copies(model: nn.Module) -> list[nn.Module]:
    meta = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    meta.load_state_dict(model.state_dict())
    state = type(model).__new__(type(model))
    state.__setstate__(model.__dict__.copy())
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), meta, state]


def test_deepcopy_pickle_setstate_and_meta_device_keep_the_answer() -> None:
    model, inputs = transformer(), batch()
    for other in copies(model):
        assert type(other) is FusedTransformer
        assert torch.equal(other(*inputs), model(*inputs))


def test_functional_call_grad_vmap_jvp_and_double_backward() -> None:
    model = transformer(activation="gelu").double()
    src, tgt = batch(torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], src: Tensor, tgt: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (src[None], tgt[None])).sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, src, tgt)
    model(src, tgt).sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)
    model.requires_grad_(False)
    leaf = src[:1, :3].clone().requires_grad_()

    def run(src: Tensor) -> Tensor:
        return model(src, tgt[:1, :2])

    assert torch.autograd.gradcheck(run, leaf, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaf, fast_mode=True)


@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_autocast_gives_its_dtype(mode: str) -> None:
    model, inputs = transformer(), batch()
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = in_mode(model, mode, *inputs)
        inner = in_mode(model.encoder.layers[0].linear2, mode, torch.randn(2, FF))
    assert inner.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_checkpointing_repeats_every_dropout() -> None:
    layer, x = transformer(dropout=0.5).encoder.layers[0], batch()[0].requires_grad_()
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(run(x).sin().sum(), x)[0])
    assert torch.equal(*grads)


def test_compiles_as_one_graph_for_any_batch_and_length_and_exports() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FusedTransformer(E, H, 1, 1, FF, 0.0, batch_first=True)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for sizes in ((3, 7, 5), (2, 4, 6), (5, 9, 3)):
        src, tgt = torch.randn(sizes[0], sizes[1], E), torch.randn(sizes[0], sizes[2], E)
        mask = torch.ones(sizes[2], sizes[2], dtype=torch.bool).triu(1)
        expected = model(src, tgt, tgt_mask=mask)
        torch.testing.assert_close(compiled(src, tgt, tgt_mask=mask), expected)
    assert len(graphs) == 1
    n, s = torch.export.Dim("n", min=2), torch.export.Dim("s", min=2)
    program = torch.export.export(model.encoder.eval(), batch()[:1], dynamic_shapes=({0: n, 1: s},))
    other = torch.randn(2, 4, E)
    torch.testing.assert_close(program.module()(other), model.encoder(other))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_capture_and_replay() -> None:
    model = transformer().cuda().eval()
    src, tgt = (x.cuda() for x in batch())
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(src, tgt)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(src, tgt)
        src.copy_(torch.randn_like(src))
        graph.replay()
        torch.testing.assert_close(out, model(src, tgt))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_is_refused_with_a_clear_message() -> None:
    for stock, arguments in ARGUMENTS.items():
        with pytest.raises(NotImplementedError, match=r"torch.compile"):
            torch.jit.script(DROP_INS[stock](*arguments))
