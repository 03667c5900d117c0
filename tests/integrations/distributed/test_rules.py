"""DTensors through every operator: whatever the placement, the numbers of one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fused_attn
from fused_attn.integrations.distributed.rules import RULES
from fused_attn.ops.operations import OPERATIONS
from tests.cases.world import needs_gloo, world

pytestmark = needs_gloo


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Sums over shards are added in another order: float64, so that no bound need be chosen."""
    whole = actual.full_tensor() if isinstance(actual, DTensor) else actual
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {m}")


def compare(
    function: Callable[..., Any], tensors: dict[str, Tensor], mesh: Any, cut: dict[str, Any]
) -> dict[str, Any]:
    """One call on DTensors placed by `cut` against plain tensors; placements of the results.

    `cut`: placement, or placements, by name of the operand; others are replicated.
    """
    results: list[dict[str, Tensor]] = []
    placed: dict[str, Any] = {}
    for sharded in (False, True):
        given = {}
        for name, x in tensors.items():
            x = x.clone()
            if sharded:
                places = cut.get(name, Replicate())
                places = places if isinstance(places, list) else [places] * mesh.ndim
                x = distribute_tensor(x, mesh, places)
            given[name] = x.requires_grad_() if x.is_floating_point() else x
        out = function(**given)
        out = out if isinstance(out, tuple) else (out,)
        found = {f"result {i}": x for i, x in enumerate(out)}
        sum((x.sin() * (i + 1)).sum() for i, x in enumerate(out)).backward()
        found |= {f"d{n}": x.grad for n, x in given.items() if x.is_floating_point()}
        if sharded:
            assert all(isinstance(x, DTensor) for x in found.values())
            placed = {name: x.placements[-1] for name, x in found.items()}
        results.append(found)
    for name, x in results[0].items():
        close(results[1][name], x, f"{name} of {cut}")
    return placed


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check_attention(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))

    def attend(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> Any:
        return fused_attn.attention(q, k, v, causal=True, window=(3, 0), return_lse=True, **rest)

    b, h, length, d = 4, 4, 6, 8
    q, k, v = numbers(b, h, length, d), numbers(b, h, length, d), numbers(b, h, length, d)
    for dim in (0, 1, 2, 3):
        placed = compare(attend, {"q": q, "k": k, "v": v}, mesh, dict.fromkeys("qkv", Shard(dim)))
        kept = Shard(dim) if dim < 2 else Replicate()  # positions are gathered, never cut
        assert placed["result 0"] == placed["dk"] == kept, placed
    everything = {
        "q": q, "k": k, "v": v, "bias": numbers(1, h, length, length),
        "key_padding_mask": torch.rand(b, length) < 0.8,
        "mask": torch.rand(b, 1, length, length) < 0.8,
        "sinks": numbers(h),
    }  # fmt: skip
    for dim in (0, 1):
        cut = dict.fromkeys("qkv", Shard(dim)) | {"key_padding_mask": Replicate()}
        placed = compare(attend, everything, mesh, cut)
        assert placed["result 0"] == Shard(dim)
    grouped = {"q": q, "k": k[:, :2].contiguous(), "v": v[:, :2].contiguous()}
    placed = compare(attend, grouped, mesh, {"q": Shard(1)})
    assert (placed["result 0"] == Shard(1)) is (2 % size == 0)
    odd = {
        "q": numbers(b, 6, length, d),
        "k": numbers(b, 3, length, d),
        "v": numbers(b, 3, length, d),
    }
    placed = compare(attend, odd, mesh, dict.fromkeys("qkv", Shard(1)))
    assert placed["result 0"] != Shard(1) or size == 1
    if size == 2:
        uneven = {name: numbers(3, 3, length, d) for name in "qkv"}
        for dim in (0, 1):
            assert compare(attend, uneven, mesh, dict.fromkeys("qkv", Shard(dim)))
    lengths = {"q": q, "k": k, "v": v, "key_lengths": torch.tensor([6, 1, 0, 3])}
    compare(attend, lengths, mesh, dict.fromkeys("qkv", Shard(0)))

    def packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Any:
        return fused_attn.attention_varlen(q, k, v, starts, starts, 6, 6, causal=True)

    rows = {name: numbers(9, 4, d) for name in "qkv"}
    rows["starts"] = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert compare(packed, rows, mesh, dict.fromkeys("qkv", Shard(1)))["result 0"] == Shard(1)
    assert compare(packed, rows, mesh, dict.fromkeys("qkv", Shard(0)))["result 0"] == Replicate()

    def weights(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fused_attn.attention(q, k, v, return_weights="average")

    for dim in (0, 1):
        compare(weights, {"q": q, "k": k, "v": v}, mesh, dict.fromkeys("qkv", Shard(dim)))


def check_mesh(rank: int) -> None:
    """Batch and heads at once, on two dimensions; grouped heads that one of them divides."""
    mesh = init_device_mesh("cpu", (2, 2))
    cut = {name: [Shard(0), Shard(1)] for name in "qkv"}
    tensors = {"q": numbers(2, 4, 5, 8), "k": numbers(2, 2, 5, 8), "v": numbers(2, 2, 5, 8)}
    placed = compare(lambda q, k, v: fused_attn.attention(q, k, v), tensors, mesh, cut)
    assert placed["result 0"] == Shard(1)
    norm = {"x": numbers(2, 4, 6), "w": numbers(6)}
    placed = compare(
        lambda x, w: fused_attn.rms_norm(x, (6,), w), norm, mesh, {"x": [Shard(0), Shard(1)]}
    )
    assert placed["result 0"] == Shard(1)
    assert placed["dw"] == Partial()


def check_rows(rank: int, size: int) -> None:
    """Norms, bias + activation, linear, embedding, on each dimension of their input."""
    mesh = init_device_mesh("cpu", (size,))
    shard_rows = (Shard(0), Shard(1))
    x, width = numbers(4, 4, 8), 8
    parameters = {"weight": numbers(width), "bias": numbers(width)}

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return fused_attn.add_layer_norm(x, residual, (8,), weight, bias, return_sum=True)

    for cut in (*shard_rows, Shard(2), Partial()):
        placed = compare(norm, {"x": x, "residual": x + 1, **parameters}, mesh, {"x": cut})
        if cut in shard_rows:
            assert placed["result 0"] == placed["result 1"] == placed["dx"] == cut
            assert placed["dweight"] == placed["dbias"] == Partial()  # as torch's own rule
    for cut in shard_rows:
        placed = compare(
            lambda x, w: fused_attn.rms_norm(x, 8, w), {"x": x, "w": numbers(8)}, mesh, {"x": cut}
        )
        assert placed["result 0"] == cut
    for gated, cut in itertools.product((False, True), (*shard_rows, Shard(2))):
        placed = compare(
            lambda x, b, gated=gated: fused_attn.bias_activation(
                x, b, activation="gelu", gated=gated
            ),
            {"x": x, "b": numbers(8)},
            mesh,
            {"x": cut},
        )
        if cut in shard_rows or not gated:
            assert placed["result 0"] == cut
            assert placed["db"] == (Shard(0) if cut == Shard(2) else Partial())
    tokens = torch.randint(0, 10, (4, 4))
    table = {"tokens": tokens, "weight": numbers(10, 8), "table": numbers(4, 8)}

    def embed(tokens: Tensor, weight: Tensor, table: Tensor | None = None) -> Any:
        return fused_attn.embedding(tokens, weight, table, scale=3.0, padding_idx=1)

    for cut in shard_rows:
        placed = compare(embed, table, mesh, {"tokens": cut})
        assert placed["result 0"] == (cut if cut == Shard(0) else Replicate())
        del placed
        placed = compare(embed, dict(list(table.items())[:2]), mesh, {"tokens": cut})
        assert placed["result 0"] == cut
        assert placed["dweight"] == Partial()
    placed = compare(embed, table, mesh, {"weight": Shard(1), "table": Shard(1)})
    assert placed["result 0"] == Shard(2)
    compare(embed, table, mesh, {"weight": Shard(0)})


def check_linear(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    tensors = {"x": numbers(4, 4, 8), "weight": numbers(8, 8), "bias": numbers(8)}
    tensors = {name: x.float() for name, x in tensors.items()}
    column = {"weight": Shard(0), "bias": Shard(0)}
    row = {"x": Shard(2), "weight": Shard(1)}
    for options in ({}, {"activation": "silu"}, {"activation": "silu", "gated": True}):

        def product(x: Tensor, weight: Tensor, bias: Tensor, options: Any = options) -> Any:
            return fused_attn.linear(x, weight, bias, backend="cpu", **options)

        for cut in ({"x": Shard(0)}, {"x": Shard(1)}, column, row):
            results = []
            for sharded in (False, True):
                given = {n: x.clone().requires_grad_() for n, x in tensors.items()}
                if sharded:
                    given = {
                        n: distribute_tensor(x.detach(), mesh, [cut.get(n, Replicate())])
                        for n, x in tensors.items()
                    }
                    given = {n: x.requires_grad_() for n, x in given.items()}
                y = product(**given)
                y.sin().sum().backward()
                if sharded and not options.get("gated"):
                    kinds = {"x": cut.get("x"), "weight": Shard(2)}
                    partial = cut is row and not options
                    expected = Partial() if partial else kinds["weight" if cut is column else "x"]
                    assert cut is row or y.placements == (expected,), (cut, y.placements)
                    assert not partial or y.placements == (Partial(),)
                results.append([y, *(x.grad for x in given.values())])
            for plain, other in zip(*results, strict=True):
                torch.testing.assert_close(other.full_tensor(), plain, rtol=1e-5, atol=1e-5)


def check_dropout(rank: int, size: int) -> None:
    """One mask, that of one process with the same seed and offset; and one draw for all ranks."""
    mesh = init_device_mesh("cpu", (size,))
    rng = torch.tensor([5, 7])
    x = torch.randn(4, 4, 8)

    def cut(t: Tensor, dim: int = 1) -> DTensor:
        return distribute_tensor(t, mesh, [Shard(dim)])

    q = torch.randn(4, 4, 6, 8)
    plain = fused_attn.attention(q, q, q, dropout_p=0.5, dropout_rng=rng)
    spread = distribute_tensor(rng, mesh, [Replicate()])
    d = cut(q)
    found = fused_attn.attention(d, d, d, dropout_p=0.5, dropout_rng=spread)
    torch.testing.assert_close(found.full_tensor(), plain)
    torch.manual_seed(rank)  # each rank would draw its own
    for found in (
        fused_attn.attention(d, d, d, dropout_p=0.5),
        fused_attn.add_layer_norm(cut(x), cut(x), 8, dropout_p=0.5),
        fused_attn.bias_activation(cut(x), activation="relu", dropout_p=0.5),
        fused_attn.embedding(
            cut(torch.arange(4).repeat(4, 1)), distribute_tensor(x[0], mesh, [Replicate()]),
            dropout_p=0.5,
        ),
    ):  # fmt: skip
        whole = found.full_tensor()
        first = whole.clone()
        torch.distributed.broadcast(first, 0)
        torch.testing.assert_close(whole, first)


def check_mixtures(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    x = torch.randn(4, 4, 8)
    d = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"`weight` must be a DTensor as `x` is, got a plain"):
        fused_attn.layer_norm(d, (8,), x[0, 0], x[0, 0])
    q = d[:, None]
    with pytest.raises(TypeError, match=r"`mask` must be a DTensor as `q` is"):
        fused_attn.attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool))


def test_every_operator_has_a_rule() -> None:
    import torch.distributed.tensor as sharded

    from fused_attn.integrations.distributed import register

    register()
    assert set(RULES) == {operation.name for operation in OPERATIONS}
    known = sharded.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    library = [name for name in torch._C._dispatch_get_all_op_names() if "fused_attn::" in name]
    assert len(library) >= 2 * len(OPERATIONS)
    for name in library:
        operator = getattr(torch.ops.fused_attn, name.partition("::")[2]).default
        assert operator in known, f"{name} has no rule"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "check", [check_attention, check_rows, check_linear, check_dropout, check_mixtures]
)
def test_shards_give_the_numbers_of_one_process(check: Callable[..., None], size: int) -> None:
    world(size).run(check, size)


def test_two_dimensions_of_a_mesh() -> None:
    world(4).run(check_mesh)


def check_late_results(rank: int) -> None:
    """Tensors of torch's functional collectives, which are not there yet, forward and backward."""
    from torch.distributed import _functional_collectives as collectives

    def late(x: Tensor) -> Tensor:
        return collectives.all_reduce(x / 2, "sum", torch.distributed.group.WORLD)

    x, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    torch.distributed.broadcast(x, 0)
    q = x.view(1, 1, 4, 8)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: fused_attn.layer_norm(x, (8,), weight),
        lambda x: fused_attn.bias_activation(x, weight, activation="gelu"),
        lambda x: fused_attn.linear(x, weight[None], backend="cpu"),
        lambda x: fused_attn.attention(q, x.view(1, 1, 4, 8), q, causal=True),
    ]
    for call in calls:
        results = []
        for make in (late, torch.clone):
            weight.grad = None
            point = x.clone().requires_grad_()
            with torch.no_grad():
                given = make(point)
            given.requires_grad_()
            y = call(given)
            y.sin().sum().backward()
            results.append((y, given.grad, weight.grad))
        for a, b in zip(*results, strict=True):
            if b is not None:
                torch.testing.assert_close(a + 0, b)


def test_results_of_collectives_that_are_not_there_yet() -> None:
    world(2).run(check_late_results)
