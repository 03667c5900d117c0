"""Tiles that a bool mask hides are listed beforehand and not visited; in Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, run_backend, run_plain, skip_unless_supported
from torch import Tensor

from fused_attn import triton_runtime
from fused_attn.testing import attention_noise, check_against_oracle

pytest.importorskip("triton", reason="Triton is not installed")

GRAIN = 16
FORWARD_TILE, KEYS_TILE, QUERIES_TILE = (32, 64), (64, 32), (32, 64)  # (queries, keys)


def sparse_mask(*shape: int) -> Tensor:
    """Most cells of 16 x 16 hidden, no row whole, rows without a key, and a whole tile of them."""
    *planes, rows, cols = shape
    cells = torch.rand(*planes, -(-rows // GRAIN), -(-cols // GRAIN)) < 0.2
    mask = cells.repeat_interleave(GRAIN, -2).repeat_interleave(GRAIN, -1)[..., :rows, :cols]
    mask = mask & (torch.rand(shape) < 0.9)
    mask[..., 7 % rows, :] = False
    if rows > 96:
        mask[..., 64:96, :] = False
    return mask


CASES = {
    "shared by the heads": (Case(2, 2, 1, 100, 140), (2, 1, 100, 140)),
    "one row for all queries": (Case(2, 2, 2, 70, 200), (2, 1, 1, 200)),
    "one column for all keys": (Case(1, 2, 2, 150, 90), (1, 2, 150, 1)),
    "causal": (Case(1, 2, 1, 120, 140, causal="lower_right"), (1, 1, 120, 140)),
    "window past the keys": (Case(1, 2, 2, 150, 40, window=(20, 5)), (1, 1, 150, 40)),
    "everything": (
        Case(1, 2, 1, 70, 130, 20, 12, causal=True, window=(70, 0), padding="holes", bias="1hqk",
             alibi=True, softcap=5.0, dropout_p=0.2),
        (1, 1, 70, 130),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_mask(name: str) -> None:
    case, shape = CASES[name]
    tensors = {**case.tensors(torch.float32), "mask": sparse_mask(*shape)}
    skip_unless_supported(case, "triton", tensors)
    check_against_oracle(
        functools.partial(run_backend, case, "triton"),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse", "weights"),
        attention_noise,
    )


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many matrix products the interpreter has made since the last look."""
    from triton.runtime import interpreter

    count = 0
    make = interpreter.InterpreterBuilder.create_dot

    def counting(*args):
        nonlocal count
        count += 1
        return make(*args)

    def look() -> int:
        nonlocal count
        seen, count = count, 0
        return seen

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counting)
    return look


def tiles_shown(mask: Tensor, rows: int, cols: int) -> int:
    """Tiles of one plane in which anything is visible."""
    return sum(bool(part.any()) for strip in mask.split(rows, -2) for part in strip.split(cols, -1))


def test_hidden_tiles_are_not_multiplied(products: Callable[[], int]) -> None:
    if not triton_runtime.interpreted():
        pytest.skip("counts the interpreter's products")
    case = Case(1, 3, 1, 160, 256)
    mask = sparse_mask(1, 1, 160, 256)
    tensors = {**case.tensors(torch.float32), "mask": mask}
    shown = {tile: tiles_shown(mask[0, 0], *tile) for tile in ((32, 64), (64, 32))}
    assert 0 < shown[FORWARD_TILE] < 5 * 4, "the mask hides no tile: nothing is proven"
    out = run_backend(case, "triton", **tensors)[0]
    assert products() == 3 * 2 * shown[FORWARD_TILE]
    out.sum().backward()
    assert products() == 3 * (4 * shown[KEYS_TILE] + 3 * shown[QUERIES_TILE])


def test_a_mask_that_only_one_head_has_is_not_read_twice(products: Callable[[], int]) -> None:
    """Reading it beforehand would cost as much as it saves: all tiles are visited."""
    case = Case(1, 2, 2, 64, 128)
    tensors = {**case.tensors(torch.float32, requires_grad=False)}
    tensors["mask"] = torch.zeros(1, 2, 64, 128, dtype=torch.bool)
    skip_unless_supported(case, "triton", tensors)
    run_backend(case, "triton", **tensors)
    if triton_runtime.interpreted():
        assert products() == 2 * 2 * (2 * 2)


def test_when_lists_pay() -> None:
    from fused_attn.attention.triton import config

    long = 4096 * 4096
    forward, backward = 2, 7

    def pays(head_dim: int, planes: int, masks: int, products: int, scores: int = long) -> bool:
        kind = config.Kind(head_dim, 2, 90, 1, 227 << 10)
        return config.lists_pay(kind, masks * scores, planes * scores, products)

    assert pays(64, 8, 1, forward)
    assert not pays(64, 8, 8, forward), "each head its own mask: the forward would read it twice"
    assert pays(64, 8, 8, backward)
    assert not pays(64, 8, 1, forward, 512 * 512), "a short call is over before two more launches"
