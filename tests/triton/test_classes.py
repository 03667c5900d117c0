"""Tiles of functions that are classified beforehand: which are visited, and when anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from fused_attn import flex_attention
from fused_attn.flex import memory
from fused_attn.runtime.triton import device as triton_device
from tests.triton.test_functions import check, normal

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not triton_device.interpreted(), reason="runs on the interpreter")

B, H, LQ, LK, D = 2, 2, 150, 165, 16  # several tiles of each kernel, and a remainder


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "triton")
    memory._kept.clear()


def _of_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + 40 * h >= kv) & (kv // 9 != 4)


def _of_batch(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return ((q // 48 == kv // 48) | (b == 1)) & ((kv < 100) | (q % 50 != 7))


BITS = normal(LQ, LK, seed=3) > -2.5
MASKS: dict[str, Any] = {
    # None is an operand, or not all of it is: a band or a hidden key, and the rest by code.
    "stripes": lambda b, h, q, kv: (q // 40 + kv // 40) % 3 != 1,
    "by head": _of_head,
    "by batch": _of_batch,
    "causal and more": lambda b, h, q, kv: (q >= kv) & ((q < 70) | (kv >= 33)),
    "window and table": lambda b, h, q, kv: ((q - kv).abs() <= 60) & BITS[q, kv],
    "rows that see nothing": lambda b, h, q, kv: (q // 32 != 1) & (q // 16 + kv // 16 < 9),
    "keys that nobody sees": lambda b, h, q, kv: (kv // 64 != 1) & (q // 16 + kv // 16 < 9),
}
SCORES: dict[str, Any] = {
    "none": None,
    "changed": lambda s, b, h, q, kv: s * 0.5 + torch.tanh((q - kv) / 20.0),
    # It hides by itself, even all of a tile that the mask shows wholly.
    "hides": lambda s, b, h, q, kv: torch.where((kv < 64) & (q > 40), float("-inf"), s),
}


@contextlib.contextmanager
def never() -> Iterator[None]:
    """Nothing is classified."""
    from fused_attn.ops.attention.triton import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "classes_pay", lambda *given: False)
        yield


def made(score: Any, mask: Any) -> Callable[[Any], tuple[Any, Any]]:
    return lambda captured: (score, mask)


@pytest.mark.parametrize("name", MASKS)
def test_against_float64(name: str) -> None:
    for score in ("none", "changed"):
        check(made(SCORES[score], MASKS[name]), {}, (B, H, 1, LQ, LK, D))


@pytest.mark.parametrize("name", ["by head", "causal and more"])
def test_against_float64_in_half(name: str) -> None:
    check(made(None, MASKS[name]), {}, (B, H, 1, LQ, LK, D), dtype=torch.float16)


def test_a_change_that_hides() -> None:
    check(made(SCORES["hides"], MASKS["by batch"]), {}, (B, H, 1, LQ, LK, D))


def test_gradients_of_what_was_captured() -> None:
    def make(captured: dict[str, Tensor]) -> tuple[Any, Any]:
        relative, scales = captured["relative"], captured["scales"]
        return (lambda s, b, h, q, kv: s * scales[h] + relative[q - kv + LK]), MASKS["by batch"]

    learned = {"relative": normal(LQ + LK, seed=21), "scales": normal(H, seed=23).abs()}
    check(make, learned, (B, H, 1, LQ, LK, D))


@pytest.mark.parametrize("size", [(32, 16), (24, 40), (128, 128)])
def test_lists_of_blocks(size: tuple[int, int]) -> None:
    def blocks(mask: Any) -> Any:
        return create_block_mask(mask, None, H, LQ, LK, device="cpu", BLOCK_SIZE=size)

    for score in ("none", "changed"):
        check(made(SCORES[score], MASKS["by head"]), {}, (B, H, 1, LQ, LK, D), blocks=blocks)


def test_lists_whose_last_blocks_are_full() -> None:
    """The last tile ends with the last block, and both before a whole number of blocks."""
    length, size = 187, 16

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q + 40 * h >= kv) | (kv >= 128)

    def blocks(mask_mod: Any) -> Any:
        places = torch.meshgrid(*map(torch.arange, (1, H, length, length)), indexing="ij")
        rest = -length % size
        seen = torch.nn.functional.pad(mask_mod(*places).float(), (0, rest, 0, rest), value=0.5)
        number = seen.shape[2] // size
        cut = seen.view(1, H, number, size, number, size).transpose(3, 4).flatten(4)
        full = (cut > 0).all(-1)
        lists = []
        for kind in (((cut == 1).any(-1) & ~full), full):
            order = kind.int().sort(dim=-1, descending=True, stable=True).indices
            lists += [kind.sum(-1, dtype=torch.int32), order.int()]
        options: Any = {"BLOCK_SIZE": size, "mask_mod": mask_mod, "seq_lengths": (length, length)}
        return BlockMask.from_kv_blocks(*lists, **options)

    for score in ("none", "changed"):
        check(made(SCORES[score], mask), {}, (1, H, 1, length, length, D), blocks=blocks)


# --- with and without ---


def results(
    score: Any,
    mask: Any,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
    batch: int = B,
    heads: int = H,
) -> list[Tensor]:
    """out, lse and gradients of one call."""
    shapes = ((batch, heads, LQ, D), (batch, 1, LK, D), (batch, 1, LK, D))
    qkv = [(factor * normal(*s, seed=n)).to(dtype).requires_grad_() for n, s in enumerate(shapes)]
    out, lse = flex_attention(*qkv, score, mask, enable_gqa=True, return_lse=True)
    loss = (out * normal(*out.shape, seed=7)).sum() + lse[lse.isfinite()].sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, qkv)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("stripes", torch.float32), ("by batch", torch.float16), ("window and table", torch.float32)],
)
def test_equal_without_classes(name: str, dtype: torch.dtype) -> None:
    """Full tiles come first, so sums differ by their order, and by nothing else."""
    mine = results(None, MASKS[name], dtype)
    again = results(None, MASKS[name], dtype)
    with never():
        plain = results(None, MASKS[name], dtype)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    for one, two, his in zip(mine, again, plain, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, his, rtol=bound, atol=bound * float(his.abs().max() + 1)
                                   if his.isfinite().all() else bound)  # fmt: skip


def test_coarse_scores_whose_statistics_are_anew() -> None:
    """Scores of more than 1e4: the statistics walk through the tiles."""
    given: dict[str, Any] = {"factor": 120.0, "batch": 1, "heads": 1}
    mine = results(None, MASKS["stripes"], **given)
    with never():
        plain = results(None, MASKS["stripes"], **given)
    for one, his in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, his, rtol=1e-4, atol=1e-4 * float(his.abs().max()))


# --- what is visited, and where mask code runs ---


class Counted:
    """Tiles that kernels score, by whether the mask's code runs in them, and by place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fused_attn.ops.attention.triton import function_source

        self.tiles: dict[str, set[tuple[int, int]]] = {"seen": set(), "asked": set()}
        compiled = function_source._compiled
        self._wrapped: dict[str, Any] = {}

        def wrapped(source: str) -> tuple[Any, Any]:
            if source not in self._wrapped:
                load, change = compiled(source)
                self._wrapped[source] = (load, self._counting(change, "-float" in source))
            return self._wrapped[source]

        monkeypatch.setattr(function_source, "_compiled", wrapped)

    def _counting(self, change: Any, asks: bool) -> Any:
        def counting(score: Any, loaded: Any, m0: Any, n0: Any, *rest: Any) -> Any:
            if self.kernel:
                place = int(m0.handle.data.item()), int(n0.handle.data.item())
                self.tiles["asked" if asks else "seen"].add(place)
            return change(score, loaded, m0, n0, *rest)

        counting.__name__ = change.__name__
        return counting

    kernel = False


KERNELS = ("forward", "statistics", "backward_dkdv", "backward_dq")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_visited(kernel: str, listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile that shows nothing, and no mask code where all of a tile is shown."""
    counted = Counted(monkeypatch)
    blocks: set[tuple[int, int]] = set()
    launch = triton_device.launch

    def watched(what: Any, *given: Any, **options: Any) -> Any:
        counted.kernel = what.fn.__name__ == f"_attention_{kernel}_kernel"
        if counted.kernel:
            config = next(x for x in given if hasattr(x, "BLOCK_M"))
            blocks.add((config.BLOCK_M.value, config.BLOCK_N.value))
        launch(what, *given, **options)
        counted.kernel = False

    monkeypatch.setattr(triton_device, "launch", watched)

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q // 64 * 64 + 20 >= kv) & (kv < 96)

    mask = mask_mod
    if listed:
        mask = create_block_mask(mask_mod, None, None, LQ, LK, device="cpu", BLOCK_SIZE=16)
    # Of statistics only coarse scores are looked at; of coarse products all count as masked.
    score = (lambda s, b, h, q, kv: s + 20000.0) if kernel == "statistics" else None
    results(score, mask, batch=1, heads=1)
    [(block_m, block_n)] = blocks
    q, kv = torch.meshgrid(torch.arange(LQ), torch.arange(LK), indexing="ij")
    shown = mask_mod(0, 0, q, kv)
    wanted: dict[str, set[tuple[int, int]]] = {"seen": set(), "asked": set()}
    for m0 in range(0, LQ, block_m):
        for n0 in range(0, LK, block_n):
            tile = shown[m0 : m0 + block_m, n0 : n0 + block_n]
            if tile.any():
                whole = tile.all() and tile.shape == (block_m, block_n)
                wanted["seen" if whole else "asked"].add((m0, n0))
    assert wanted["seen"]
    assert wanted["asked"]
    assert counted.tiles == wanted


@pytest.mark.parametrize(
    ("name", "planes"), [("stripes", (1, 1)), ("by head", (1, H)), ("by batch", (B, 1))]
)
def test_the_map_is_small(name: str, planes: tuple[int, int]) -> None:
    """A byte for 256 pairs, and only for batch elements and heads that differ."""
    q, k = torch.zeros(B, H, LQ, D), torch.zeros(B, H, LK, D)
    flex_attention(q, k, k, block_mask=MASKS[name])
    [kept] = memory._kept.values()
    assert kept.memory["classes"].shown().cells.shape == (*planes, 10, 11)
