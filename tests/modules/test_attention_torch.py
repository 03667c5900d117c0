"""FusedMultiheadAttention among torch's tools: copies, hooks, weights of all kinds, transforms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_attn import FusedMultiheadAttention, last_backend
from tests.cases.mha import E, H, L, N, S, formula, pair

pytestmark = pytest.mark.usefixtures("one_thread")


def built(**settings) -> tuple[FusedMultiheadAttention, Tensor]:
    _, ours = pair(E, H, batch_first=True, **settings)
    return ours, torch.randn(N, L, E)


def test_deepcopy_and_pickle_give_equal_independent_modules() -> None:
    ours, x = built(add_bias_kv=True)
    expected = ours(x, x, x)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is FusedMultiheadAttention
        assert torch.equal(other(x, x, x)[0], expected)
        with torch.no_grad():
            other.out_proj.bias.add_(1.0)
        assert torch.equal(ours(x, x, x)[0], expected)


def test_state_of_torch_1_1_is_completed() -> None:
    ours, x = built()
    state = ours.__dict__.copy()
    del state["_qkv_same_embed_dim"]
    old = FusedMultiheadAttention.__new__(FusedMultiheadAttention)
    old.__setstate__(state)
    assert torch.equal(old(x, x, x)[0], ours(x, x, x)[0])


def test_meta_device_gives_shapes_and_materialises() -> None:
    ours = FusedMultiheadAttention(E, H, batch_first=True, device="meta")
    x = torch.empty(N, L, E, device="meta")
    padding = torch.zeros(N, L, dtype=torch.bool, device="meta")
    out, weights = ours(x, x, x, key_padding_mask=padding)
    assert out.is_meta
    assert out.shape == (N, L, E)
    assert weights.shape == (N, L, L)
    real = ours.to_empty(device="cpu")
    real._reset_parameters()
    assert real(torch.ones(N, L, E), *[torch.ones(N, L, E)] * 2)[0].shape == (N, L, E)


def test_fake_tensors_give_shapes() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        ours = FusedMultiheadAttention(E, H, batch_first=True)
        x = torch.randn(N, L, E)
        out, weights = ours(x, x, x)
    assert out.shape == (N, L, E)
    assert weights.shape == (N, L, L)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_the_low_dtype_and_takes_float32_masks(dtype: torch.dtype) -> None:
    ours, x = built(add_bias_kv=True, add_zero_attn=True)
    expected, _ = formula(ours, x, x, x)
    mask = torch.zeros(L, L)
    with torch.autocast("cpu", dtype=dtype):
        out, weights = ours(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


def test_out_proj_is_called_as_a_module() -> None:
    """torch.nn reads its weight and never calls it."""
    ours, x = built()
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    out, _ = ours(x, x, x)
    assert len(seen) == 1
    assert torch.equal(seen[0], out)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            ours.eval()(x, x, x)
    assert len(seen) == 3


def test_replaced_out_proj_acts() -> None:
    ours, x = built()

    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(E, 2, bias=False), nn.Linear(2, E, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    merged = copy.deepcopy(ours)
    ours.out_proj = LowRank(ours.out_proj)
    with torch.no_grad():
        merged.out_proj.weight += ours.out_proj.up.weight @ ours.out_proj.down.weight
    torch.testing.assert_close(ours(x, x, x)[0], merged(x, x, x)[0])
    ours(x, x, x)[0].sum().backward()
    assert ours.out_proj.up.weight.grad is not None


def test_hooks_on_the_module_see_torch_arguments_and_result() -> None:
    ours, x = built()
    ours.register_forward_pre_hook(lambda module, args: tuple(2 * a for a in args))
    ours.register_forward_hook(lambda module, args, result: (result[0] + 1.0, result[1]))
    hooked = ours(x, x, x)[0]
    ours._forward_pre_hooks.clear()
    ours._forward_hooks.clear()
    torch.testing.assert_close(hooked, ours(2 * x, 2 * x, 2 * x)[0] + 1.0)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2.0


@pytest.mark.parametrize("target", ["in_proj_weight", "out_proj"])
def test_parametrized_weights_are_computed_at_each_call(target: str) -> None:
    ours, x = built()
    expected = ours(x, x, x)[0]
    owner, name = (ours.out_proj, "weight") if target == "out_proj" else (ours, target)
    parametrize.register_parametrization(owner, name, Doubled())
    torch.testing.assert_close(ours(x, x, x)[0], expected)
    with torch.no_grad():
        owner.parametrizations[name].original.add_(0.1)
    changed = ours(x, x, x)[0]
    assert not torch.allclose(changed, expected)
    parametrize.remove_parametrizations(owner, name)
    assert type(ours) is FusedMultiheadAttention
    torch.testing.assert_close(ours(x, x, x)[0], changed)


def test_weight_norm_spectral_norm_and_pruning_act() -> None:
    x = torch.randn(N, L, E)
    for apply in (
        lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
        lambda m: parametrizations.spectral_norm(m.out_proj),
        lambda m: prune.l1_unstructured(m, "in_proj_weight", amount=0.5),
    ):
        stock, ours = pair(E, H, batch_first=True)
        for module in (stock, ours):
            torch.manual_seed(1)
            apply(module)
            module.eval()
        torch.testing.assert_close(ours(x, x, x), stock(x, x, x))


def test_weights_are_never_cached() -> None:
    ours, x = built()
    ours(x, x, x)
    _, other = pair(E, H, batch_first=True, seed=5)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours(x, x, x)[0], other(x, x, x)[0])
    ours.in_proj_weight = nn.Parameter(torch.zeros(3 * E, E))
    assert not torch.equal(ours(x, x, x)[0], other(x, x, x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_leaves_out_proj_alone_and_runs_in_eval() -> None:
    ours, x = built()
    expected = ours(x, x, x)[0]
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(ours).eval(), {nn.Linear})
    with torch.no_grad():
        torch.testing.assert_close(model[0](x, x, x)[0], expected)


def test_functional_call_uses_the_given_parameters() -> None:
    ours, x = built()
    _, other = pair(E, H, batch_first=True, seed=5)
    out, _ = torch.func.functional_call(ours, dict(other.named_parameters()), (x, x, x))
    assert torch.equal(out, other(x, x, x)[0])


def test_per_sample_gradients_by_vmap_of_grad() -> None:
    ours, x = built()
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        out, _ = torch.func.functional_call(ours, parameters, (sample,) * 3)
        return out.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(N):
        ours.zero_grad()
        ours(x[i], x[i], x[i])[0].square().sum().backward()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradcheck_and_double_backward(need_weights: bool) -> None:
    _, ours = pair(4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
        return (out, weights) if need_weights else (out,)

    assert torch.autograd.gradcheck(run, (x, mask))
    assert torch.autograd.gradgradcheck(run, (x, mask))


@pytest.mark.parametrize("need_weights", [True, False])
def test_jvp_agrees_with_a_finite_difference(need_weights: bool) -> None:
    """torch.nn raises NotImplementedError here without need_weights."""
    _, ours = pair(E, H, batch_first=True, dtype=torch.float64)
    x, t = torch.randn(2, N, L, E, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return ours(x, x, x, need_weights=need_weights)[0]

    _, tangent = torch.func.jvp(run, (x,), (t,))
    step = 1e-6
    expected = (run(x + step * t) - run(x - step * t)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


def test_activation_checkpointing_repeats_the_dropout() -> None:
    ours, x = built(dropout=0.5)
    results = []
    for wrap in (False, True):
        torch.manual_seed(4)
        ours.zero_grad()
        if wrap:
            out, _ = torch.utils.checkpoint.checkpoint(ours, x, x, x, use_reentrant=False)
        else:
            out, _ = ours(x, x, x)
        out.square().sum().backward()
        results.append((out, ours.in_proj_weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("settings", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_compiles_as_one_graph(dynamic: bool, settings: dict[str, bool]) -> None:
    torch._dynamo.reset()
    ours, _ = built(**settings)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((2, 4), (3, 6)):
        x = torch.randn(batch, length, E)
        padding = torch.arange(length) >= torch.arange(2, 2 + batch)[:, None]
        arguments = {"key_padding_mask": padding, "is_causal": True}
        for extra in ({}, {"attn_mask": torch.rand(length, length) < 0.3}):
            torch.testing.assert_close(
                compiled(x, x, x, **arguments, **extra), ours(x, x, x, **arguments, **extra)
            )


def test_compiled_gradients_agree_with_eager() -> None:
    torch._dynamo.reset()
    ours, x = built()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (ours, compiled):
        ours.zero_grad()
        out, weights = module(x, x, x)
        (out.square().sum() + weights.square().sum()).backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    torch.testing.assert_close(*grads)


def test_exports_with_dynamic_batch_and_length() -> None:
    ours, x = built()
    ours.eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = ours

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = {"x": {0: batch, 1: length}, "padding": {0: batch, 1: length}}
    padding = torch.zeros(N, L, dtype=torch.bool)
    program = torch.export.export(Model(), (x, padding), dynamic_shapes=shapes)
    other = torch.randn(4, 9, E)
    hidden = torch.arange(9) >= torch.tensor([[9], [4], [1], [0]])
    expected = ours(other, other, other, key_padding_mask=hidden)[0]
    torch.testing.assert_close(program.module()(other, hidden), expected)


@pytest.mark.filterwarnings("ignore")
def test_trace_follows_the_module() -> None:
    ours, x = built()
    memory = torch.randn(N, S, E)
    traced = torch.jit.trace(ours, (x, memory, memory), check_trace=False)
    torch.testing.assert_close(traced(x, memory, memory), ours(x, memory, memory))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_is_refused_with_a_way_out() -> None:
    ours, _ = built()
    for model in (ours, nn.Sequential(ours)):
        with pytest.raises(NotImplementedError, match=r"fused_attn.unfuse\(model\)"):
            torch.jit.script(model)


def test_backend_attribute_decides_who_runs() -> None:
    ours, x = built()
    ours.backend = "reference"
    ours(x, x, x)
    assert last_backend() == "reference"
    assert pickle.loads(pickle.dumps(ours)).backend == "reference"
