"""Tiles that a bool mask hides are listed beforehand and not visited; in Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fused_attn.runtime.triton import device as triton_device
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain, skip_unless_supported

pytest.importorskip("triton", reason="Triton is not installed")

GRAIN = 16
FORWARD_TILE, KEYS_TILE, QUERIES_TILE = (32, 64), (64, 32), (32, 64)  # (queries, keys)
BIAS_TILE, WEIGHTS_TILE = (32, 64), (64, 64)
DECODE_KEYS = 32  # in float32


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
    "weights of their average": (
        Case(1, 2, 1, 70, 100, bias="11qk", weights="average", dropout_p=0.2), (1, 1, 70, 100),
    ),
    "weights of each head": (
        Case(1, 2, 2, 70, 90, bias="1h11", weights="per_head", causal="lower_right"),
        (1, 1, 70, 90),
    ),
    "decoding": (Case(1, 2, 1, 3, 600), (1, 1, 3, 600)),
    "decoding, a mask for each head": (Case(1, 2, 2, 1, 700, bias="111k"), (1, 2, 1, 700)),
}  # fmt: skip
# The others walk along the lists of the forward and its backward, as the first ones do.
IN_HALF = ("weights of their average", "weights of each head", "decoding")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), *((name, torch.float16) for name in IN_HALF)],
)
def test_a_sparse_mask(name: str, dtype: torch.dtype) -> None:
    case, shape = CASES[name]
    tensors = {**case.tensors(dtype), "mask": sparse_mask(*shape)}
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
    if not triton_device.interpreted():
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


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_tiles_have_no_weights_and_no_bias_gradient(
    products: Callable[[], int], causal: bool
) -> None:
    """Hidden by a mask, or above the diagonal."""
    if not triton_device.interpreted():
        pytest.skip("counts the interpreter's products")
    case = Case(1, 2, 1, 128, 192, causal=causal, bias="1hqk", weights="average")
    tensors = case.tensors(torch.float32)
    mask = torch.ones(128, 192, dtype=torch.bool).tril()
    if not causal:
        mask = sparse_mask(128, 192) & (torch.arange(192) < 128)
        tensors["mask"] = mask[None, None]
    shown = {tile: tiles_shown(mask, *tile) for tile in (FORWARD_TILE, KEYS_TILE, WEIGHTS_TILE)}
    assert 0 < shown[WEIGHTS_TILE] < 2 * 3, "no tile is hidden: nothing is proven"
    out, _, weights = run_backend(case, "triton", **tensors)
    assert products() == 2 * (2 * shown[FORWARD_TILE] + shown[WEIGHTS_TILE])
    assert (weights.detach()[0, 0][~mask] == 0.0).all()
    (out.sum() + weights.square().sum()).backward()
    of_operands = 4 * shown[KEYS_TILE] + 3 * shown[QUERIES_TILE]
    assert products() == 2 * (of_operands + 2 * shown[BIAS_TILE] + shown[WEIGHTS_TILE])
    assert (tensors["bias"].grad[0][:, ~mask] == 0.0).all()


def test_decoding_does_not_multiply_what_a_mask_hides(products: Callable[[], int]) -> None:
    if not triton_device.interpreted():
        pytest.skip("counts the interpreter's products")
    case = Case(2, 4, 2, 1, 700)
    mask = torch.zeros(2, 1, 1, 700, dtype=torch.bool)
    mask[0, ..., 40:70] = True
    mask[1, ..., 690:] = True
    tensors = {**case.tensors(torch.float32, requires_grad=False), "mask": mask}
    run_backend(case, "triton", **tensors)
    shown = sum(tiles_shown(plane[0], 1, DECODE_KEYS) for plane in mask)
    assert products() == 2 * 2 * shown


def test_a_mask_that_only_one_head_has_is_not_read_twice(products: Callable[[], int]) -> None:
    """Reading it beforehand would cost as much as it saves: all tiles are visited."""
    case = Case(1, 2, 2, 64, 128)
    tensors = {**case.tensors(torch.float32, requires_grad=False)}
    tensors["mask"] = torch.zeros(1, 2, 64, 128, dtype=torch.bool)
    skip_unless_supported(case, "triton", tensors)
    run_backend(case, "triton", **tensors)
    if triton_device.interpreted():
        assert products() == 2 * 2 * (2 * 2)


def test_when_lists_pay() -> None:
    from fused_attn.ops.attention.triton import config

    long = 4096 * 4096
    forward, backward = 2, 7

    def pays(head_dim: int, planes: int, masks: int, products: int, scores: int = long) -> bool:
        kind = config.ProblemClass(head_dim, 2, 90, 1, 227 << 10)
        return config.lists_pay(kind, masks * scores, planes * scores, products)

    assert pays(64, 8, 1, forward)
    assert not pays(64, 8, 8, forward), "each head its own mask: the forward would read it twice"
    assert pays(64, 8, 8, backward)
    assert not pays(64, 8, 1, forward, 512 * 512), "a short call is over before two more launches"

    kind = config.ProblemClass(128, 2, 90, 1, 227 << 10)
    rows, keys = 4, 4096
    decode = config.decode_products(kind, rows)
    for heads, batch, longer in ((8, 16, True), (8, 1, False)):
        assert config.lists_pay(kind, batch * keys, batch * heads * rows * keys, decode) == longer
