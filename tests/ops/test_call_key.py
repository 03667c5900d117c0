"""What a repeated call is recognised by, and when it must not be: `dispatch.PlanCache`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import attention
from fused_attn.ops import dispatch
from fused_attn.runtime import native

CallKey = Callable[[tuple[Any, ...], tuple[Any, ...]], Hashable]


@pytest.fixture(params=["compiled", "python", "attributes"])
def asked(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The compiled module, reading tensors in both ways that it can, and what stands in for it."""
    if request.param == "python":
        yield SimpleNamespace(
            call_key=dispatch._call_key_in_python,
            backward_is_plain=dispatch._backward_is_plain_in_python,
        )
        return
    if native.why_not() is not None:
        pytest.skip(native.why_not())
    before = native.module().use_exchange_api(request.param == "compiled")
    yield native.module()
    native.module().use_exchange_api(before)


@pytest.fixture
def call_key(asked: Any) -> CallKey:
    return asked.call_key


class Subclass(torch.Tensor):
    pass


class Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


SCALARS = (True, None, 0.5, "average", (3, -1))
CALLS = {
    "plain": ((torch.ones(2, 3), None), SCALARS),
    "another shape": ((torch.ones(3, 2), None), SCALARS),
    "another rank": ((torch.ones(2, 3, 1), None), SCALARS),
    "another dtype": ((torch.ones(2, 3).bfloat16(), None), SCALARS),
    "a parameter": ((torch.nn.Parameter(torch.ones(2, 3), False), None), SCALARS),
    "one that wants a gradient": ((torch.ones(2, 3, requires_grad=True), None), SCALARS),
    "another operand": ((None, torch.ones(2, 3)), SCALARS),
    "two operands": ((torch.ones(2, 3), torch.ones(2, 3)), SCALARS),
    "the first wants a gradient": (
        (torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)), SCALARS,
    ),
    "the second wants a gradient": (
        (torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)), SCALARS,
    ),
    "a flag": ((torch.ones(2, 3), None), (False, *SCALARS[1:])),
    "a number": ((torch.ones(2, 3), None), (*SCALARS[:2], 0.25, *SCALARS[3:])),
    "a string": ((torch.ones(2, 3), None), (*SCALARS[:3], "per_head", SCALARS[4])),
    "a tuple": ((torch.ones(2, 3), None), (*SCALARS[:4], (3, 1))),
    "a longer tuple": ((torch.ones(2, 3), None), (*SCALARS[:4], (3, -1, 0))),
    "a tuple elsewhere": ((torch.ones(2, 3), None), (*SCALARS[:3], (3, -1), "average")),
    "a number that is none": ((torch.ones(2, 3), None), (True, 0.0, *SCALARS[2:])),
}  # fmt: skip


def test_calls_are_told_apart_and_recognised(call_key: CallKey) -> None:
    keys = {name: call_key(*call) for name, call in CALLS.items()}
    assert None not in keys.values()
    assert len(set(keys.values())) == len(CALLS)
    for name, call in CALLS.items():
        assert call_key(*copy.deepcopy(call)) == keys[name]
    with torch.no_grad():
        assert call_key(*CALLS["one that wants a gradient"]) == keys["plain"]


def test_strides_and_data_do_not_matter(call_key: CallKey) -> None:
    assert call_key((torch.zeros(3, 2).T,), ()) == call_key((torch.ones(2, 3),), ())


@pytest.mark.parametrize(
    ("operands", "scalars"),
    [
        ((torch.ones(2).as_subclass(Subclass),), ()),
        (("no tensor",), ()),
        ((torch.ones(2),), ([1, 2],)),
        ((torch.ones(2),), (SimpleNamespace(),)),
    ],
    ids=["subclass", "no tensor", "list", "object"],
)  # fmt: skip
def test_what_cannot_be_recognised_has_no_key(
    call_key: CallKey, operands: tuple[Any, ...], scalars: tuple[Any, ...]
) -> None:
    assert call_key(operands, scalars) is None


def test_what_the_compiled_key_cannot_hold_is_none() -> None:
    if native.why_not() is not None:
        pytest.skip(native.why_not())
    assert native.module().call_key((), ("x" * 4000,)) is None
    assert native.module().call_key((), (2**70,)) is None
    assert native.module().call_key((torch.ones(2, device="meta"),), ()) is None
    assert native.module().call_key((torch.ones(2, dtype=torch.complex64),), ()) is None
    assert native.module().launch_key((torch.ones(2, dtype=torch.complex64),)) is None
    assert native.module().launch_key((torch.ones([1] * 8),) * 40) is None
    with pytest.raises(TypeError, match="takes a tuple"):
        native.module().launch_key([torch.ones(2)])


def test_whoever_watches_is_noticed(call_key: CallKey) -> None:
    call = CALLS["plain"]
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(call_key(*call))
        return x.sum()

    torch.func.grad(look)(torch.ones(3))
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.jit.trace(look, torch.ones(3), check_trace=False)
    with Watcher():
        look(torch.ones(3))
    with forward_ad.dual_level():
        look(torch.ones(3))
    assert seen == [None] * 5
    assert call_key(*call) is not None


def test_a_backward_is_plain_if_nobody_looks(asked: Any) -> None:
    """What the engine hands to a backward in each of these circumstances."""
    x = torch.ones(3, requires_grad=True)
    said: list[bool] = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
            said.append(asked.backward_is_plain(dout))
            return dout

    def pull_back(vector: torch.Tensor, **how: Any) -> None:
        torch.autograd.grad(Ask.apply(x), x, vector, **how)

    pull_back(torch.ones(3))
    pull_back(torch.nn.Parameter(torch.ones(3)))
    assert said == [True, True]
    pull_back(torch.ones(3), create_graph=True)
    pull_back(torch.ones(3).as_subclass(Subclass))
    pull_back(torch.ones(2, 3), is_grads_batched=True)
    out = Ask.apply(x)
    torch.func.vmap(lambda v: torch.autograd.grad(out, x, v)[0])(torch.ones(2, 3))
    with Watcher():
        pull_back(torch.ones(3))
    assert said[2:] == [False] * 5


def test_what_a_transform_left_behind_has_no_key(call_key: CallKey) -> None:
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(torch.ones(1, 2, 3, 4))
    assert call_key((left[0],), ()) is None


def test_what_a_transform_left_behind_is_right_with_a_gradient() -> None:
    left = []
    x = torch.randn(1, 2, 3, 4)
    torch.func.grad(lambda x: left.append(x) or x.sum())(x)
    k = torch.randn(1, 2, 3, 4, requires_grad=True)
    for _ in range(2):
        out = attention(left[0], k, k)
        expected = attention(x, k, k)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(y.sin().sum(), k)[0] for y in (out, expected)]
        assert torch.equal(*grads)


def test_the_route_follows_the_circumstances() -> None:
    """One signature, first plain, then watched, then plain again."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    expected = attention(q, q, q)
    with Watcher() as watcher:
        assert torch.equal(attention(q, q, q), expected)
    if fused_attn.last_backend() != "reference":
        assert "fused_attn.attention_forward.default" in watcher.seen
    tangent = torch.randn_like(q)
    out, moved = torch.func.jvp(lambda x: attention(x, x, x), (q.detach(),), (tangent,))
    torch.testing.assert_close(out, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.detach(), tangent)
        derivative = forward_ad.unpack_dual(attention(dual, dual, dual)).tangent
    torch.testing.assert_close(derivative, moved)
    assert torch.equal(attention(q, q, q), expected)
