"""`flex_attention` of DTensors: by batch and heads, the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from fused_attn import flex_attention
from tests.cases.world import needs_gloo, world

pytestmark = needs_gloo

B, H, L, D = 3, 4, 10, 8


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def functions(table: Any, slopes: Any) -> dict[str, tuple[Any, Any]]:
    """Changes of scores and masks that know of batch and head, or not."""
    lengths = torch.tensor([10, 4, 7])
    return {
        "operands": (None, lambda b, h, q, kv: (q >= kv) & (kv < lengths[b])),
        "heads": (lambda s, b, h, q, kv: s * slopes[h] + table[b, h, q, kv] * b, None),
        "batch": (lambda s, b, h, q, kv: s + 0.1 * b * s * s, lambda b, h, q, kv: (kv + b) % 3 < 2),
        "relative": (lambda s, b, h, q, kv: s + slopes[(q - kv).abs() % 4], None),
    }


def check(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    q, k, v = numbers(B, H, L, D), numbers(B, 2, L, D), numbers(1, 2, L, D).expand(B, -1, -1, -1)
    learned = [numbers(B, H, L, L), numbers(H)]
    for name in functions(*learned):
        for cut in (Shard(0), Shard(1), Shard(2), Replicate()):
            blocks = "batch" in name and cut in (Shard(0), Shard(1))
            results = []
            for sharded in (False, True):
                qkv = [x.clone() for x in (q, k, v)]
                if sharded:
                    qkv = [distribute_tensor(x, mesh, [cut]) for x in qkv]
                qkv = [x.requires_grad_() for x in qkv]
                captured = [x.clone().requires_grad_() for x in learned]
                score, mask = functions(*captured)[name]
                if blocks:
                    mask = create_block_mask(mask, B, H, L, L, device="cpu", BLOCK_SIZE=4)
                out, lse = flex_attention(*qkv, score, mask, enable_gqa=True, return_lse=True)
                assert isinstance(out, DTensor) == isinstance(lse, DTensor) == sharded
                if sharded:
                    kept = cut in (Shard(0), Shard(1))  # positions are gathered
                    assert out.placements == (cut if kept else Replicate(),)
                    assert lse.shape == (B, H, L)
                (out.sin().sum() + lse.sin().sum()).backward()
                found = [out, lse, *(x.grad for x in (*qkv, *captured))]
                results.append([x.full_tensor() if isinstance(x, DTensor) else x for x in found])
            for mine, his in zip(*results, strict=True):
                assert (mine is None) == (his is None), name
                if his is not None:
                    torch.testing.assert_close(mine, his, rtol=1e-9, atol=1e-11)


def check_others(rank: int) -> None:
    """Heads that cannot be cut with their keys, one batch element of keys for all, max_scores."""
    mesh = init_device_mesh("cpu", (2,))
    square = lambda s, b, h, q, kv: s * s * (1 + h)  # noqa: E731
    for heads_kv, batch_kv in ((1, B), (H, 1)):
        q, k = numbers(B, H, L, D), numbers(batch_kv, heads_kv, L, D)
        for cut in (Shard(0), Shard(1), Partial()):
            results = []
            for sharded in (False, True):
                if sharded:
                    given = Replicate() if batch_kv == 1 or cut == Partial() else cut
                    mine = distribute_tensor(q, mesh, [Replicate() if cut == Partial() else cut])
                    if cut == Partial():
                        mine = DTensor.from_local(q / 2, mesh, [cut])
                    theirs = distribute_tensor(k, mesh, [given])
                else:
                    mine, theirs = q.clone(), k.clone()
                mine, theirs = mine.requires_grad_(), theirs.requires_grad_()
                out, aux = flex_attention(
                    mine,
                    theirs,
                    theirs,
                    square,
                    enable_gqa=True,
                    return_aux=AuxRequest(max_scores=True),
                )
                assert aux.lse is None
                out.sin().sum().backward()
                found = (out, aux.max_scores, mine.grad, theirs.grad)
                results.append([x.full_tensor() if isinstance(x, DTensor) else x for x in found])
            torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def check_refusals(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plain = numbers(2, 2, L, D)
    cut = distribute_tensor(plain, mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"`key` must be a DTensor as `query` is, got a plain"):
        flex_attention(cut, plain, cut)
    with pytest.raises(TypeError, match=r"`query` must be a DTensor as `key` is, got a plain"):
        flex_attention(plain, cut, cut)
    slopes = distribute_tensor(numbers(2), mesh, [Replicate()])
    for q in (cut, plain):
        with pytest.raises(ValueError, match="`score_mod` captured a DTensor"):
            flex_attention(q, q, q, lambda s, b, h, i, j: s * slopes[h])


def check_mesh(rank: int) -> None:
    """Batch and heads at once."""
    mesh = init_device_mesh("cpu", (2, 2))
    q = numbers(2, H, L, D)
    slopes = numbers(2, H)
    score = lambda s, b, h, i, j: s * s * slopes[b, h]  # noqa: E731
    wanted = flex_attention(q, q, q, score)
    cut = distribute_tensor(q, mesh, [Shard(0), Shard(1)])
    out = flex_attention(cut, cut, cut, score)
    assert out.to_local().shape == (1, H // 2, L, D)
    torch.testing.assert_close(out.full_tensor(), wanted, rtol=1e-9, atol=1e-11)


def test_by_batch_and_heads() -> None:
    world(2).run(check, 2)
    world(2).run(check_others)


def test_refusals() -> None:
    world(2).run(check_refusals)


@pytest.mark.every
def test_a_mesh_of_two_dimensions() -> None:
    world(4).run(check_mesh)
