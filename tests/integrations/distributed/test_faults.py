"""What goes wrong on one rank is an error by name on all of them, in time; nobody hangs."""

from __future__ import annotations

import datetime
import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_attn.integrations.distributed import (
    context_parallel,
    ring_attention,
    shard,
    ulysses_attention,
)
from tests.cases.world import World, needs_gloo, world

pytestmark = needs_gloo


def call(rank: int, name: str) -> Any:
    """A call that is wrong on rank 1, or on all."""
    wrong = rank == 1
    q = torch.randn(2, 4, 8, 16)
    functions = {"ring": ring_attention, "ulysses": ulysses_attention}
    function = functions["ulysses" if name.startswith("ulysses") else "ring"]
    options: dict[str, Any] = {}
    k = v = q
    if name == "unequal parts":
        k = v = q = torch.randn(2, 4, 6 if wrong else 8, 16)
    elif name == "odd parts":
        k = v = q = torch.randn(2, 4, 7, 16)
        options["order"] = "zigzag"
    elif name == "dtype":
        k = v = q = q.double() if wrong else q
    elif name == "device":
        k = torch.empty(q.shape, device="meta") if wrong else q
    elif name == "all on another device":
        k = v = q = torch.empty(q.shape, device="meta") if wrong else q
    elif name == "rank":
        q = q[0] if wrong else q
    elif name == "options":
        options["causal"] = wrong
    elif name == "no order":
        options["order"] = "snake"
    elif name == "mask":
        options["mask"] = torch.ones(8, 8, dtype=torch.bool) if wrong else None
    elif name == "bias":
        options["bias"] = torch.zeros(8, 8)
    elif name == "misspelt":
        options["cu_seqlen"] = None
    elif name == "packed":
        k = v = q = torch.randn(8, 4, 16)
        options["cu_seqlens"] = torch.tensor([0, 99 if wrong else 9], dtype=torch.int32)
    elif name == "gradients":
        q = q.requires_grad_() if wrong else q
    elif name == "ulysses heads":
        k = v = q = torch.randn(2, 3, 8, 16)
    elif name == "ulysses grouped":
        q, k, v = torch.randn(2, 12, 8, 16), *torch.randn(2, 2, 3, 8, 16)
    elif name == "sequence":
        return shard(torch.randn(2, 17, 4))
    elif name == "zigzag sequence":
        return shard(torch.randn(2, dist.get_world_size() * 3, 4), order="zigzag")
    elif name == "DTensor":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        k = v = q = distribute_tensor(q, mesh, [Shard(2)])
    elif name == "mesh":
        from torch.distributed.device_mesh import init_device_mesh

        options["group"] = init_device_mesh("cpu", (dist.get_world_size(), 1))
    elif name == "group of one":
        alone = [dist.new_group([n]) for n in range(dist.get_world_size())]
        options["group"] = alone[dist.get_rank()]
    elif name == "method":
        with context_parallel(method="star"):
            return None
    return function(q, k, v, **options)


FAULTS = {
    "unequal parts": "(one shape|same call).*8, 16.*6, 16|`q`",
    "odd parts": "even length, got 7 rows",
    "dtype": "torch.float32.* on rank 0 and .*torch.float64.* on rank 1",
    "device": "`k` must be on cpu, got meta",
    "all on another device": "on cpu on rank 0 and .*on meta on rank 1|meta",
    "rank": "`q` must have 4 dimensions",
    "options": "`causal` False on rank 0 and `causal` True on rank 1",
    "no order": "`order` must be 'contiguous' or 'zigzag', got 'snake'",
    "mask": "`mask` cannot be cut up",
    "bias": "`bias` cannot be cut up",
    "misspelt": "unexpected argument `cu_seqlen`",
    "packed": "`cu_seqlens` must end within",
    "gradients": "no gradients on rank 0 and gradients on rank 1",
    "ulysses heads": "`q` must have a number of heads that the .* ranks",
    "ulysses grouped": "`k` must have a number of heads that the .* ranks",
    "sequence": "`x` must have a sequence .* got 17 positions",
    "zigzag sequence": "`x` must have a sequence .* pieces divide",
    "DTensor": "`q` must be a plain tensor, this rank's part, got DTensor",
    "mesh": "`group` must be a mesh of one dimension",
    "group of one": "`group` must have more than one rank, got a group of one in a world of",
    "method": "`method` must be 'ring' or 'ulysses', got 'star'",
}


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_raise_alike(size: int) -> None:
    for name, words in FAULTS.items():
        for text in world(size).errors(call, name):
            last = text.strip().splitlines()
            assert re.search(words, text, re.S), f"{name}: {last[-3:]}"
    world(size).run(after)  # and all of them can go on


def wrong_in_one_of_two_groups(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
    q = torch.randn(1, 4, 6 if rank == 1 else 8, 8)
    ulysses_attention(q, q, q, mesh["heads"], ring=mesh["ring"])


def test_both_groups_hear_of_a_fault_in_one() -> None:
    for text in world(4).errors(wrong_in_one_of_two_groups):
        assert "`q` torch.float32 (1, 4, 8, 8)" in text
        assert "(1, 4, 6, 8)" in text
    world(4).run(after)


def after(rank: int) -> None:
    q = torch.randn(1, 4, 4, 8)
    assert ring_attention(q, q, q).isfinite().all()


def outside(rank: int) -> None:
    """A rank that is not in the group is told so; those in it go on, if it is none of one."""
    q = torch.randn(1, 4, 4, 8)
    for members in ([0], [0, 1]):
        group = dist.new_group(members)
        if rank in members:
            for function in (ring_attention, ulysses_attention):
                if len(members) == 1:
                    with pytest.raises(ValueError, match="`group` must have more than one rank"):
                        function(q, q, q, group)
                else:
                    assert function(q, q, q, group).shape == q.shape
        else:
            with pytest.raises(RuntimeError, match=f"a process group that this rank .*{rank}"):
                ring_attention(q, q, q, group)


def test_groups_of_some_ranks() -> None:
    world(4).run(outside)


def die(rank: int, function: str, when: str) -> None:
    """Rank 1 leaves before the call, or between its parts; the others must not wait for ever."""
    q = torch.randn(1, 4, 64, 8)
    k = q.clone().requires_grad_()
    if when == "silent" and rank == 1:
        time.sleep(6)
    attend = ring_attention if function == "ring" else ulysses_attention
    if when == "before" and rank == 1:
        os._exit(1)
    out = attend(q, k, k, causal=True, check=when == "before")
    if when == "between" and rank == 1:
        os._exit(1)
    out.sum().backward()


@pytest.mark.parametrize(
    ("function", "when"), [("ring", "before"), ("ring", "between"), ("ulysses", "between")]
)
def test_a_rank_that_dies_is_an_error_on_all_others(function: str, when: str) -> None:
    lonely = World(3, datetime.timedelta(seconds=10)) if function == "ring" else World(2)
    try:
        lonely.start(die, function, when)
        answers = lonely.answers(60)
        assert answers.pop(1) == (False, None)
        for right, text in answers:
            assert not right
            assert "a rank of the group is gone, or did not answer" in text
    finally:
        lonely.close()


def test_a_silent_rank_is_an_error_after_the_time_out() -> None:
    lonely = World(2, datetime.timedelta(seconds=3))
    try:
        lonely.start(die, "ring", "silent")
        for right, text in lonely.answers(60):
            assert not right
            assert "did not answer within its time-out" in text
    finally:
        lonely.close()


def test_without_a_process_group_it_is_said() -> None:
    q = torch.randn(1, 4, 4, 8)
    with pytest.raises(RuntimeError, match=r"(?s)not initialised.*init_process_group"):
        ring_attention(q, q, q)
