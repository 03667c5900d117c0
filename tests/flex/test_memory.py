"""Memories of masks: one for each signature."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.flex import memory


def test_a_dead_tensor_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may have its number and its place."""
    monkeypatch.setattr(memory, "_identity", lambda tensor: 0)
    q, nodes = torch.zeros(1, 1, 4, 8), [0]

    def kept(table: Tensor) -> Any:
        mask = SimpleNamespace(nodes=nodes, captured=[table])
        call: Any = SimpleNamespace(mask=mask, block_mask=None)
        return memory.memory_of(call, q, q)

    one = torch.zeros(3)
    first = kept(one)
    assert kept(one) is first
    del one
    assert kept(torch.zeros(3)) is not first


def test_of_a_tensor_that_changes_one_memory_is_kept() -> None:
    memory._kept.clear()
    table = torch.zeros(3)
    call: Any = SimpleNamespace(mask=SimpleNamespace(nodes=[0], captured=[table]), block_mask=None)
    q = torch.zeros(1, 1, 4, 8)
    found = []
    for _ in range(4):
        found.append(memory.memory_of(call, q, q))
        assert memory.memory_of(call, q, q) is found[-1]
        assert len(memory._kept) == 1
        table += 1
    assert len(set(map(id, found))) == 4


def test_another_device_or_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    call: Any = SimpleNamespace(mask=SimpleNamespace(nodes=[], captured=[]), block_mask=None)
    q = torch.zeros(1, 1, 4, 8)
    kept = memory.memory_of(call, q, q)
    assert memory.memory_of(call, q, q) is kept
    other = q.to("meta")
    assert memory.memory_of(call, other, other) is not kept
    monkeypatch.setattr(memory, "_queue", lambda device: 7)
    assert memory.memory_of(call, q, q) is not kept
    monkeypatch.setattr(memory, "_queue", lambda device: None)  # of a graph that is recorded
    assert memory.memory_of(call, q, q) is not memory.memory_of(call, q, q)
