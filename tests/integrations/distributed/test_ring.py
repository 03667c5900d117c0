"""Attention over parts of a sequence, on worlds of 1, 2 and 4: the numbers of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fused_attn
from fused_attn.integrations.distributed import (
    bytes_sent,
    counting,
    ring_attention,
    shard,
    ulysses_attention,
    unshard,
)
from fused_attn.ops.attention.reference import keep_mask
from fused_attn.testing import assert_within_budget
from tests.cases.world import needs_gloo, world

pytestmark = needs_gloo

B, H, L, D = 2, 4, 16, 8
RNG = torch.tensor([11, 5])


def tensors(
    dtype: torch.dtype = torch.float64, heads_kv: int = H, length_k: int = L, d_v: int = D
) -> list[Tensor]:
    """q, k, v and dout; the same on all ranks."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((H, L, D), (heads_kv, length_k, D), (heads_kv, length_k, d_v), (H, L, d_v))
    return [torch.randn(B, *shape, generator=draw).to(dtype) for shape in shapes]


def whole(given: list[Tensor], **options: Any) -> list[Tensor]:
    """out, lse and gradients of one process."""
    q, k, v, dout = given
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = fused_attn.attention(*inputs, return_lse=True, **options)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    ((out * dout).sum() + finite.sin().sum()).backward()
    return [out, lse, *(x.grad for x in inputs)]


def parts(
    function: Any, given: list[Tensor], order: str, layout: str = "bhld", **options: Any
) -> list[Tensor]:
    """The same by `function` on parts, put together again."""
    q, k, v, dout = (shard(x, dim=2, order=order) for x in given)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    turned = [x.transpose(1, 2) for x in inputs] if layout == "blhd" else inputs
    out, lse = function(*turned, order=order, layout=layout, return_lse=True, **options)
    out = out.transpose(1, 2) if layout == "blhd" else out
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    ((out * dout).sum() + finite.sin().sum()).backward()
    return [unshard(x, dim=2, order=order) for x in (out, lse, *(x.grad for x in inputs))]


def same(found: list[Tensor], expected: list[Tensor], what: Any) -> None:
    """In float64, so that another order of summing needs no bound of its own."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        message = f"{name} of {what}"
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-11, msg=lambda m, s=message: f"{s}: {m}"
        )


MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "window": (3, 0)},
    {"window": (5, 2)},
    {"window": (-1, 3), "softcap": 2.0, "scale": 0.3},
    {"window": (0, 0)},
]


def check_masks(rank: int, size: int) -> None:
    given = tensors()
    for order in ("contiguous", "zigzag"):
        for options in MASKS:
            expected = whole(given, **options)
            for function in (ring_attention, ulysses_attention):
                found = parts(function, given, order, **options)
                same(found, expected, (function.__name__, order, options))
    expected = whole(given, causal=True)
    same(parts(ring_attention, given, "zigzag", layout="blhd", causal=True), expected, "blhd")


def check_shapes(rank: int, size: int) -> None:
    """Grouped heads, D ≠ Dv, queries and keys of unequal number on either diagonal."""
    for options, given in (
        ({"causal": True}, tensors(heads_kv=2, d_v=3)),
        ({"causal": True}, tensors(heads_kv=1)),
        ({"causal": "lower_right"}, tensors(length_k=24)),
        ({"causal": "lower_right", "window": (4, 0)}, tensors(length_k=8)),
        ({"causal": "upper_left"}, tensors(length_k=24)),
        ({"window": (6, 6)}, tensors(length_k=24, heads_kv=2)),
    ):
        expected = whole(given, **options)
        for function in (ring_attention, ulysses_attention):
            found = parts(function, given, "zigzag", **options)
            same(found, expected, (function.__name__, options))


def check_operands(rank: int, size: int) -> None:
    """Documents, padding and sinks; rows that see nothing; a packed batch across ranks."""
    given = tensors()
    ids = torch.arange(L).div(5, rounding_mode="floor").repeat(B, 1)
    keep = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[0] = False
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    everything = {"document_ids": ids, "key_padding_mask": keep, "causal": True, "sinks": sinks}
    expected = whole(given, **everything)
    for function in (ring_attention, ulysses_attention):
        cut = {
            n: shard(everything[n], order="zigzag") for n in ("document_ids", "key_padding_mask")
        }
        mine = sinks.clone().requires_grad_()
        found = parts(function, given, "zigzag", **everything | cut | {"sinks": mine})
        same(found, expected, (function.__name__, "operands"))
        dist.all_reduce(mine.grad)
        one = sinks.clone().requires_grad_()
        whole(given, **everything | {"sinks": one})
        torch.testing.assert_close(mine.grad, one.grad, rtol=1e-9, atol=1e-11)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in given]  # (B L, H, D)
    starts = torch.tensor([0, 3, 3, 20, 29], dtype=torch.int32)  # the last 3 rows are nobody's
    inputs = [x.clone().requires_grad_() for x in rows[:3]]
    out = fused_attn.attention_varlen(*inputs, starts, starts, 17, 17, causal=True)
    (out * rows[3]).sum().backward()
    for function in (ring_attention, ulysses_attention):
        for order in ("contiguous", "zigzag"):
            cut_rows = [shard(x, dim=0, order=order) for x in rows]
            mine_rows = [x.requires_grad_() for x in cut_rows[:3]]
            found_out = function(*mine_rows, causal=True, cu_seqlens=starts, order=order)
            (found_out * cut_rows[3]).sum().backward()
            for a, b in zip((found_out, *(x.grad for x in mine_rows)),
                            (out, *(x.grad for x in inputs)), strict=True):  # fmt: skip
                torch.testing.assert_close(unshard(a, dim=0, order=order), b, rtol=1e-9, atol=1e-11)


def check_dropout(rank: int, size: int) -> None:
    """One mask, whatever the number of ranks; with causal, grouped heads, and odd sizes."""
    for p, options in ((0.4, {"causal": True}), (0.7, {"window": (6, 3)}), (1.0, {})):
        given = tensors(heads_kv=2)
        expected = whole(given, dropout_p=p, dropout_rng=RNG, **options)
        for function in (ring_attention, ulysses_attention):
            found = parts(function, given, "zigzag", dropout_p=p, dropout_rng=RNG, **options)
            same(found, expected, (function.__name__, p))
    torch.manual_seed(rank)  # the first rank draws for all
    q, k, v, _ = given = tensors()
    ones = [q, k, torch.ones_like(v), q]
    first = parts(ring_attention, ones, "contiguous", dropout_p=0.5)[0]
    sent = first.clone()
    dist.broadcast(sent, 0)
    torch.testing.assert_close(first, sent)
    del k


def check_drawn_in_parts(rank: int, size: int) -> None:
    """The bits of a large tile are drawn a few queries at a time: the same bits."""
    from fused_attn.integrations.distributed import tiles

    before, tiles._DRAWN_AT_ONCE = tiles._DRAWN_AT_ONCE, B * H * 3 * (L // size)
    try:
        given = tensors()
        for options in ({"causal": True}, {"window": (5, 1)}, {}):
            expected = whole(given, dropout_p=0.4, dropout_rng=RNG, **options)
            found = parts(
                ring_attention, given, "contiguous", dropout_p=0.4, dropout_rng=RNG, **options
            )
            same(found, expected, options)
    finally:
        tiles._DRAWN_AT_ONCE = before
    kept = tiles.Dropout(0.4, RNG, H).kept(B, H, range(3, 9), range(5, 16))
    assert torch.equal(kept, keep_mask(RNG, 0.4, (B, H, L, L))[:, :, 3:9, 5:16])


def plain_attention(given: list[Tensor]) -> list[Tensor]:
    """Causal attention in plain torch, every step in the dtype of the inputs."""
    q, k, v, dout = given
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = inputs[0] @ inputs[1].transpose(-2, -1) * D**-0.5
    scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1) @ inputs[2]
    ((out * dout).sum() + lse.sin().sum()).backward()
    return [out, lse.float(), *(x.grad for x in inputs)]


def check_budget(rank: int, size: int) -> None:
    """In float32 and bfloat16 as near to float64 as plain torch; bit for bit again."""
    for dtype in (torch.float32, torch.bfloat16):
        given = tensors(dtype)
        oracle, plain = whole([x.double() for x in given], causal=True), plain_attention(given)
        names = ("out", "lse", "dq", "dk", "dv")
        for function in (ring_attention, ulysses_attention):
            found = parts(function, given, "zigzag", causal=True)
            again = parts(function, given, "zigzag", causal=True)
            for name, a, b, p, o in zip(names, found, again, plain, oracle, strict=True):
                assert torch.equal(a, b), f"{name} differs from run to run"
                assert_within_budget(f"{name} of {function.__name__}", a, p, o)


def check_bytes(rank: int, size: int) -> None:
    """What goes out is what the formula says: ring, Ulysses, grouped heads, both at once."""
    for heads_kv in (4, 2):
        for itemsize, dtype in ((2, torch.bfloat16), (4, torch.float32)):
            given = tensors(dtype, heads_kv=heads_kv)
            sizes = {"batch": B, "seqlen": L, "num_heads": H, "num_heads_kv": heads_kv}
            sizes |= {"head_dim": D, "itemsize": itemsize}
            ways: list[tuple[Any, dict[str, int]]] = [(ring_attention, {"ring": size})]
            if H % size == 0:
                ways.append((ulysses_attention, {"ulysses": size}))
            for function, ranks in ways:
                q, k, v, dout = (shard(x, dim=2) for x in given)
                inputs = [x.requires_grad_() for x in (q, k, v)]
                with counting() as forward:
                    out = function(*inputs)
                with counting() as backward:
                    (out * dout).sum().backward()
                expected = bytes_sent(**sizes, **ranks)
                found = (sum(forward.values()), sum(backward.values()))
                assert found == tuple(expected), (function.__name__, found, expected)


def check_memory(rank: int, size: int) -> None:
    """What a rank keeps for the backward is 1/n of what one process keeps."""
    q, k, v, _ = (shard(x, dim=2) for x in tensors())
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ring_attention(*(x.requires_grad_() for x in (q, k, v)), causal=True)
    assert sum(kept) * size == 8 * B * H * L * (4 * D + 1)  # q, k, v, out and lse


def check_both(rank: int) -> None:
    """Two by two: heads inside, a ring outside."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
    ring, heads = mesh["ring"], mesh["heads"]
    for options in ({"causal": True}, {"dropout_p": 0.5, "dropout_rng": RNG}):
        given = tensors(heads_kv=2)
        expected = whole(given, **options)
        cut = [shard(shard(x, ring, dim=2, order="zigzag"), heads, dim=2) for x in given]
        inputs = [x.requires_grad_() for x in cut[:3]]
        with counting() as forward:
            out, lse = ulysses_attention(
                *inputs, heads, ring=ring, order="zigzag", return_lse=True, **options
            )
        sizes = {"batch": B, "seqlen": L, "num_heads": H, "num_heads_kv": 2, "head_dim": D}
        paper = bytes_sent(**sizes, itemsize=8, ring=2, ulysses=2)
        lse_sent = B * L // 4 * H * 8 // 2  # asked for here, and not in the formula
        assert sum(forward.values()) == paper.forward + lse_sent
        ((out * cut[3]).sum() + lse.sin().sum()).backward()
        for a, b in zip((out, lse, *(x.grad for x in inputs)), expected, strict=True):
            together = unshard(unshard(a, heads, dim=2), ring, dim=2, order="zigzag")
            torch.testing.assert_close(together, b, rtol=1e-9, atol=1e-11)


CHECKS = [
    check_masks,
    check_shapes,
    check_operands,
    check_dropout,
    check_drawn_in_parts,
    check_budget,
    check_bytes,
    check_memory,
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_parts_give_the_numbers_of_the_whole(check: Any, size: int) -> None:
    world(size).run(check, size)


def test_heads_inside_a_ring_outside() -> None:
    world(4).run(check_both)


def check_bytes_of_eight(rank: int) -> None:
    """The formula at eight ranks, where every one of eight heads has its own."""
    q = torch.randn(1, 8, 2, 4, requires_grad=True)
    k = torch.randn(1, 2, 2, 4, requires_grad=True)
    sizes = {"seqlen": 16, "num_heads": 8, "num_heads_kv": 2, "head_dim": 4, "itemsize": 4}
    for function, way in ((ring_attention, "ring"), (ulysses_attention, "ulysses")):
        with counting() as sent:
            function(q, k, k * 2, causal=True).sum().backward()
        assert sum(sent.values()) == bytes_sent(**sizes, **{way: 8}).total


@pytest.mark.every
def test_eight_ranks() -> None:
    world(8).run(check_bytes_of_eight)


def test_the_page_has_the_formulas_numbers() -> None:
    page = Path(__file__).parents[3] / "docs/distributed.md"
    sizes = {"seqlen": 128_000, "num_heads": 32, "num_heads_kv": 8, "head_dim": 128}
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (\S+) \| (.+) \|$", page.read_text(), re.M)
    assert len(rows) == 8
    for words, ring, ulysses, both in rows:
        ranks = int(words.replace(",", ""))
        assert ring == f"{bytes_sent(**sizes, ring=ranks).total / 1e6:,.0f}"
        if ulysses != "–":
            assert ulysses == f"{bytes_sent(**sizes, ulysses=ranks).total / 1e6:,.0f}"
        if both != "–":
            volume = bytes_sent(**sizes, ring=ranks // 8, ulysses=8)
            assert both == f"{volume.total / 1e6:,.0f} (8 × {ranks // 8})"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"ring": 3}, "`seqlen` must be a multiple of 3"),
        ({"ulysses": 8}, "`num_heads` must be a multiple of 8"),
        ({"ulysses": 4, "num_heads_kv": 3}, "`num_heads_kv` must be a multiple or a divisor of 4"),
    ],
)
def test_a_volume_of_nothing_that_runs_is_refused(sizes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bytes_sent(**{"seqlen": 16, "num_heads": 4, "head_dim": 8} | sizes)
