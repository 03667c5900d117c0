"""The door of everybody who calls torch's scaled_dot_product_attention."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn
from fused_attn.integrations import torch_sdpa
from fused_attn.ops.attention import BACKENDS

STOCK = F.scaled_dot_product_attention  # a name kept from before
OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch_sdpa.restore()
    assert F.scaled_dot_product_attention is STOCK


def heads(*shape, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


class Counted:
    """Calls of our kernels, counted."""

    def __init__(self, monkeypatch):
        self.forward = self.backward = 0
        for backend in BACKENDS:
            if backend.NAME == "cpu":
                monkeypatch.setattr(backend, "forward", self._counting(backend, "forward"))
                monkeypatch.setattr(backend, "backward", self._counting(backend, "backward"))

    def _counting(self, backend, name):
        inner = getattr(backend, name)

        def call(*args, **options):
            setattr(self, name, getattr(self, name) + 1)
            return inner(*args, **options)

        return call


def test_names_on_import_nothing():
    assert F.scaled_dot_product_attention is STOCK
    assert not torch_sdpa.is_active()


def test_a_caller_by_attribute_and_by_a_kept_name(monkeypatch):
    counted = Counted(monkeypatch)
    q, k, v = (heads(2, 4, 33, 32, seed=i, grad=True) for i in range(3))
    dout = heads(2, 4, 33, 32, seed=9)
    wanted = torch.autograd.grad(STOCK(q, k, v, is_causal=True), (q, k, v), dout)
    out = STOCK(q, k, v, is_causal=True)
    assert counted.forward == counted.backward == 0
    with torch_sdpa.activated():
        for number, function in enumerate((F.scaled_dot_product_attention, STOCK), 1):
            got = function(q, k, v, is_causal=True)
            torch.testing.assert_close(got, out)
            grads = torch.autograd.grad(got, (q, k, v), dout)
            torch.testing.assert_close(grads, wanted)
            assert counted.forward + counted.backward >= number  # the fast path has its own way in
    before = counted.forward
    STOCK(q.detach(), k.detach(), v.detach())
    assert counted.forward == before, "torch's kernel is back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_a_kept_name_computes_what_torch_computes(dtype, mask):
    q, k, v = (heads(2, 4, 19, 16, dtype=dtype, seed=i, grad=True) for i in range(3))
    attn_mask = None
    if mask is not None:
        attn_mask = heads(2, 1, 19, 19, seed=4) > -1
        attn_mask = attn_mask if mask == "bool" else heads(19, 19, seed=5).to(dtype)
    dout = heads(2, 4, 19, 16, dtype=dtype, seed=9)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact_mask = attn_mask if mask != "float" else attn_mask.double()
    wanted = STOCK(*exact, attn_mask=exact_mask)
    grads_wanted = torch.autograd.grad(wanted, exact, dout.double())
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, 3e-2)
    with torch_sdpa.activated():
        got = STOCK(q, k, v, attn_mask=attn_mask)
        grads = torch.autograd.grad(got, (q, k, v), dout)
    for mine, his in zip((got, *grads), (wanted, *grads_wanted), strict=True):
        torch.testing.assert_close(mine.double(), his, rtol=tolerance, atol=tolerance)


def test_what_the_dispatcher_sends_elsewhere_is_ours_by_attribute(monkeypatch):
    counted = Counted(monkeypatch)
    with torch_sdpa.activated():
        sdpa = F.scaled_dot_product_attention
        q, k, v = (heads(3, 4, 8, 16, seed=i) for i in range(3))
        assert not sdpa(q[None], k[None], v[None], dropout_p=1.0).any()
        assert fused_attn.last_backend() == "cpu"
        calls = {
            "three dimensions": lambda f: f(q, k, v),
            "a narrower v": lambda f: f(q[None], k[None], v[None, ..., :7]),
            "grouped heads": lambda f: f(q[None], k[None, :1], v[None, :1], enable_gqa=True),
            "two dimensions": lambda f: f(q[0], k[0], v[0]),
        }
        for name, call in calls.items():
            torch.testing.assert_close(call(sdpa), call(STOCK), msg=name)
        bias = heads(8, 8, seed=4, grad=True)
        (ours,) = torch.autograd.grad(sdpa(q[None], k[None], v[None], attn_mask=bias).sum(), bias)
        torch_sdpa.restore()
        (theirs,) = torch.autograd.grad(
            STOCK(q[None], k[None], v[None], attn_mask=bias).sum(), bias
        )
        torch.testing.assert_close(ours, theirs)
    assert counted.backward == 1


def test_under_vmap_and_grad_of_torch_func():
    q, k, v = (heads(3, 2, 4, 8, 16, seed=i) for i in range(3))
    wanted = torch.func.vmap(STOCK)(q, k, v)
    loss = lambda f: torch.func.grad(lambda x: f(x, k[0], v[0]).square().sum())(q[0])  # noqa: E731
    wanted_grad = loss(STOCK)
    with torch_sdpa.activated():
        torch.testing.assert_close(torch.func.vmap(F.scaled_dot_product_attention)(q, k, v), wanted)
        torch.testing.assert_close(torch.func.vmap(STOCK)(q, k, v), wanted)
        torch.testing.assert_close(loss(F.scaled_dot_product_attention), wanted_grad)
        torch.testing.assert_close(loss(STOCK), wanted_grad)


def strided(layout, grad=False):
    shapes = {
        "dense": lambda i: heads(2, 3, 5, 8, seed=i),
        "heads second": lambda i: heads(2, 5, 3, 8, seed=i).transpose(1, 2),
        "packed": lambda i: heads(2, 5, 3, 3, 8, seed=4)[:, :, i].transpose(1, 2),
        "expanded": lambda i: heads(1, 3, 5, 8, seed=i).expand(2, -1, -1, -1),
        "every second": lambda i: heads(2, 3, 10, 8, seed=i)[:, :, ::2],
    }
    return [shapes[layout](i) for i in range(3)]


@pytest.mark.parametrize("layout", ["dense", "heads second", "packed", "expanded", "every second"])
def test_the_operators_keep_the_strides_that_torch_promises(layout):
    """Compiled graphs are made for the strides of the fake operators."""

    def run(q, k, v):
        out, lse = OPERATOR(q, k, v)
        return (out, lse, *BACKWARD(out, q, k, v, out, lse, 0.0, False))

    q, k, v = strided(layout)
    with torch_sdpa.activated():
        real = run(q, k, v)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(x) for x in (q, k, v)))
    assert [x.stride() for x in real] == [x.stride() for x in fake]
    assert [x.dtype for x in real] == [x.dtype for x in fake]


def test_a_compiled_graph_whether_made_before_or_after():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = heads(2, 7, 32)
    wanted = layer(x)
    kept = torch.compile(lambda q: STOCK(q, q, q).sum(), fullgraph=True)
    q = heads(2, 7, 4, 8, grad=True)
    (before,) = torch.autograd.grad(kept(q.transpose(1, 2)), q)
    with torch_sdpa.activated():
        (after,) = torch.autograd.grad(kept(q.transpose(1, 2)), q)
        torch.testing.assert_close(after, before)
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(compiled(x), wanted)


def test_stock_modules_use_it_while_active(monkeypatch):
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = heads(2, 7, 32, grad=True)
    wanted, _ = attention(x, x, x, need_weights=False)
    (grad_wanted,) = torch.autograd.grad(wanted.sum(), x)
    seen = []
    ours = torch_sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        torch_sdpa,
        "scaled_dot_product_attention",
        lambda *args, **options: seen.append(1) or ours(*args, **options),
    )
    with torch_sdpa.activated():
        got, _ = attention(x, x, x, need_weights=False)
        (grad,) = torch.autograd.grad(got.sum(), x)
    assert seen
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad, grad_wanted)


def test_torchs_own_kernel_where_it_is_asked_for_by_name(monkeypatch):
    counted = Counted(monkeypatch)
    q = heads(1, 2, 5, 8, grad=True)
    wanted = STOCK(q, q, q)
    with torch_sdpa.activated():
        out = fused_attn.attention(q, q, q, backend="sdpa")
        torch.autograd.grad(out.sum(), q)
    assert torch.equal(out, wanted)
    assert counted.forward == counted.backward == 0


def test_what_ours_refuses_runs_torchs_code(monkeypatch):
    def refuse(*args, **options):
        raise fused_attn.UnsupportedError("not this one")

    q = heads(1, 2, 5, 8, grad=True)
    wanted = STOCK(q, q, q)
    (grad_wanted,) = torch.autograd.grad(wanted.sum(), q)
    for name in ("attention", "attention_backward", "scaled_dot_product_attention"):
        monkeypatch.setattr(torch_sdpa, name, refuse)
    with torch_sdpa.activated():
        for function in (F.scaled_dot_product_attention, STOCK):
            out = function(q, q, q)
            assert torch.equal(out, wanted)
            assert torch.equal(torch.autograd.grad(out.sum(), q)[0], grad_wanted)


def test_classes_of_torch_with_rules_of_their_own_stay_torchs():
    nested = torch.nested.nested_tensor([heads(2, 5, 8), heads(2, 3, 8)], layout=torch.jagged)
    nested = torch.nested.nested_tensor(
        [heads(5, 2, 8), heads(3, 2, 8)], layout=torch.jagged
    ).transpose(1, 2)
    wanted = STOCK(nested, nested, nested)
    with torch_sdpa.activated():
        got = F.scaled_dot_product_attention(nested, nested, nested)
        meta = torch.empty(1, 2, 3, 8, device="meta")
        assert F.scaled_dot_product_attention(meta, meta, meta).is_meta
    torch.testing.assert_close(got.values(), wanted.values())


def test_twice_and_nested_and_after_an_error():
    torch_sdpa.activate()
    torch_sdpa.activate()
    with torch_sdpa.activated():
        pass
    assert torch_sdpa.is_active(), "the inner one leaves what was there"
    torch_sdpa.restore()
    assert F.scaled_dot_product_attention is STOCK
    with pytest.raises(KeyError), torch_sdpa.activated():
        raise KeyError
    assert not torch_sdpa.is_active()
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_a_function_that_somebody_else_put_there_is_not_overwritten(monkeypatch):
    torch_sdpa.activate()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *args: None)
        with pytest.raises(RuntimeError, match="was replaced after `activate"):
            torch_sdpa.restore()
    assert torch_sdpa.is_active()


def test_torch_without_the_way_back_is_refused(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(RuntimeError, match="get_kernel"):
        torch_sdpa.activate()
    assert not torch_sdpa.is_active()


def test_mistakes_are_said_as_everywhere():
    q = heads(1, 2, 5, 8)
    with torch_sdpa.activated():
        with pytest.raises(ValueError, match="value"):
            F.scaled_dot_product_attention(q, q, q[:, :, :3])
        with pytest.raises(TypeError, match="unexpected keyword"):
            F.scaled_dot_product_attention(q, q, q, mask=None)
