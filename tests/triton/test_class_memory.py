"""When tiles of functions are classified anew: whatever their mask depends on has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from fused_attn import flex_attention
from fused_attn.flex import memory
from fused_attn.runtime.triton import device as triton_device
from tests.triton.test_classes import MASKS, SCORES, D, results
from tests.triton.test_functions import normal

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not triton_device.interpreted(), reason="runs on the interpreter")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "triton")
    memory._kept.clear()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One element each time that a mask is looked at."""
    from fused_attn.ops.attention.triton import classify

    found: list[Any] = []
    look = classify._looked_at
    monkeypatch.setattr(classify, "_looked_at", lambda *given: found.append(1) or look(*given))
    return found


def attended(mask: Any, seqlen_q: int = 40, seqlen_k: int = 70, batch: int = 1) -> Tensor:
    q, k, v = (normal(batch, 1, n, D, seed=s).float()
               for s, n in enumerate((seqlen_q, seqlen_k, seqlen_k)))  # fmt: skip
    return flex_attention(q, k, v, block_mask=mask)


def expected(visible: Tensor) -> Tensor:
    q, k, v = (normal(1, 1, n, D, seed=s)
               for s, n in enumerate((visible.shape[0], *[visible.shape[1]] * 2)))  # fmt: skip
    scores = (q @ k.mT * D**-0.5).masked_fill(~visible, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def agree(out: Tensor, visible: Tensor) -> None:
    torch.testing.assert_close(out.double(), expected(visible), rtol=1e-4, atol=1e-4)


def test_once_for_equal_calls(looks: list[Any]) -> None:
    for _ in range(3):
        attended(lambda b, h, q, kv: (q * kv) % 7 != 3)
    assert len(looks) == 1
    results(None, MASKS["by head"])  # forward and backward
    results(SCORES["changed"], MASKS["by head"])  # whatever becomes of the scores
    assert len(looks) == 2


def test_a_tensor_that_was_changed_in_place(looks: list[Any]) -> None:
    table = torch.zeros(40, 70, dtype=torch.bool)
    table[:, :20] = True

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return table[q, kv]

    agree(attended(mask), table)
    agree(attended(mask), table)
    assert len(looks) == 1
    table[:, 40:] = True  # what was empty
    agree(attended(mask), table)
    table.logical_not_()  # what was full
    agree(attended(mask), table)
    table.view(-1)[5:] = True  # by another view
    agree(attended(mask), table)
    assert len(looks) == 4
    table.data = torch.ones_like(table)
    agree(attended(mask), table)
    assert len(looks) == 5


def test_a_closure_that_was_bound_anew(looks: list[Any]) -> None:
    def bound(limit: int, table: Tensor) -> Any:
        return lambda b, h, q, kv: (kv < limit) & table[q, kv]

    one = torch.ones(40, 70, dtype=torch.bool)
    two = one.clone()
    two[:, :30] = False
    position = torch.arange(70)
    for limit, table in ((64, one), (64, two), (35, one), (64, one)):
        agree(attended(bound(limit, table)), (position < limit) & table)
    assert len(looks) == 3


def test_tensors_of_one_loop(looks: list[Any]) -> None:
    for n in range(6):
        table = torch.zeros(40, 70, dtype=torch.bool)
        table[:, 10 * n : 10 * n + 10] = True
        version = table._version
        agree(attended(lambda b, h, q, kv, table=table: table[q, kv]), table)
        assert table._version == version
        del table
    assert len(looks) == 6


def test_other_lengths_and_batches(looks: list[Any]) -> None:
    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q * kv) % 7 != 3

    for lengths in ((40, 70), (40, 90), (56, 70), (40, 70)):
        q, kv = torch.meshgrid(*map(torch.arange, lengths), indexing="ij")
        agree(attended(mask, *lengths), mask(0, 0, q, kv))
    assert len(looks) == 3
    attended(mask, batch=2)
    assert len(looks) == 4


def test_lists_that_are_others(looks: list[Any]) -> None:
    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q * kv) % 7 != 3

    one, two = (create_block_mask(mask, None, None, 40, 70, device="cpu", BLOCK_SIZE=16)
                for _ in range(2))  # fmt: skip
    for given in (one, one, two, mask):
        attended(given)
    assert len(looks) == 3


def test_tensors_that_count_no_changes_are_never_kept(looks: list[Any]) -> None:
    with torch.inference_mode():
        table = torch.ones(40, 70, dtype=torch.bool)
        for limit in (70, 30):
            table[:, limit:] = False
            agree(attended(lambda b, h, q, kv: table[q, kv]).clone(), table)
    assert len(looks) == 2


def test_few_are_kept() -> None:
    for n in range(memory._MOST + 5):
        attended(lambda b, h, q, kv, n=n: kv != n, seqlen_q=4, seqlen_k=5)
        attended(lambda b, h, q, kv, n=n: (q * kv) % 50 != n, seqlen_q=4, seqlen_k=5)
    assert len(memory._kept) == memory._MOST
