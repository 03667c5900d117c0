"""Functions of `flex_attention` inside of the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from fused_attn import explain, flex_attention
from fused_attn.flex import compiled
from fused_attn.runtime.triton import device as triton_device
from tests.flex import test_compiled as instructions
from tests.flex import test_random_expressions as expressions

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not triton_device.interpreted(), reason="runs on the interpreter")

WAY = "in the loop of the Triton kernels"
B, H, LQ, LK, D = 2, 2, 18, 37, 8  # a tile of queries, and two of keys with a remainder


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "triton")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def oracle(
    qkv: tuple[Tensor, ...], score_mod: Any, mask_mod: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """The formula on all pairs: the functions take whole tensors of positions."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    places = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *places)
    if mask_mod is not None:
        scores = scores.masked_fill(~mask_mod(*places), -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v, scores.logsumexp(-1)


def check(
    make: Callable[[dict[str, Tensor]], tuple[Any, Any]],
    learned: dict[str, Tensor],
    shape: tuple[int, ...] = (B, H, 1, LQ, LK, D),
    dtype: torch.dtype = torch.float32,
    blocks: Any = None,
    way: str = WAY,
) -> None:
    """Ours, lse and every gradient against float64.

    Args:
        make: of the captured tensors, the change of scores and the mask.
        blocks: of the mask function what is given in its place.
    """
    batch, heads, heads_kv, seqlen_q, seqlen_k, size = shape
    shapes = ((batch, heads, seqlen_q, size), *[(batch, heads_kv, seqlen_k, size)] * 2)
    results = []
    for ours in (True, False):
        kind = dtype if ours else torch.float64
        # Both get what the dtype holds.
        qkv = [normal(*s, seed=n).to(dtype).to(kind) for n, s in enumerate(shapes)]
        wide = torch.float32 if ours else torch.float64
        captured = {name: x.float().to(wide).requires_grad_() for name, x in learned.items()}
        qkv = [x.requires_grad_() for x in qkv]
        score_mod, mask_mod = make(captured)
        if ours:
            mask = mask_mod if blocks is None else blocks(mask_mod)
            options = {"scale": 0.3, "enable_gqa": True}
            [said] = explain(flex_attention, *qkv, score_mod, mask, **options).notes
            assert said == f"runs {way}" or (way != WAY and way in said), said
            out, lse = flex_attention(*qkv, score_mod, mask, return_lse=True, **options)
        else:
            out, lse = oracle(tuple(qkv), score_mod, mask_mod, 0.3)
        seen = lse.detach().isfinite()
        loss = (out * normal(*out.shape, seed=7)).sum() + lse[seen].sin().sum()
        inputs = [*qkv, *captured.values()]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        zeros = [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
        ]
        results.append([out, lse, *zeros])
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for n, (mine, his) in enumerate(zip(*results, strict=True)):
        largest = bound * (1 + his.nan_to_num(neginf=0.0).abs().max().item())
        torch.testing.assert_close(
            mine.double(), his, rtol=bound, atol=largest, msg=lambda m, n=n: f"result {n}: {m}"
        )


# --- every instruction ---

LEARNED = {
    "pair": normal(LQ, LK, seed=11),
    "four": normal(B, H, LQ, LK, seed=12),
    "head": normal(H, seed=14),
    "of_q": normal(B, LQ, seed=15),
    "of_k": normal(H, LK, seed=16),
    "apart": normal(H, instructions.LQ + instructions.LK, seed=17),
}
FIXED = {
    "vec": normal(50, seed=13).float(),
    "ids": torch.randint(0, 50, (LQ, LK), generator=torch.Generator().manual_seed(18)),
    "bits": normal(B, H, LQ, LK, seed=19) > 0,
    "half": normal(LQ, LK, seed=20).bfloat16(),
}
TOGETHER = 3  # expressions that one call takes


def joined(n: int) -> tuple[str, str | None]:
    """A few of the expressions at once, and a mask."""
    sources = [f"({line})" for line in instructions.SCORES[n : n + TOGETHER]]
    text = " + ".join(sources)
    for nested, plain in {
        "four[b][h]": "four[b, h]",
        "four[b, h][q, kv]": "four[b, h, q, kv]",
        "of_q[b][q]": "of_q[b, q]",
        "of_k[h][kv]": "of_k[h, kv]",
    }.items():
        text = text.replace(nested, plain)
    return text, instructions.MASKS[n // TOGETHER % len(instructions.MASKS)]


@pytest.mark.parametrize("n", range(0, len(instructions.SCORES), TOGETHER))
def test_every_instruction_and_its_derivative(n: int) -> None:
    source, mask = joined(n)
    used = {name: x for name, x in LEARNED.items() if name in source}

    def make(captured: dict[str, Tensor]) -> tuple[Any, Any]:
        fixed = {k: x.to(captured_dtype(captured)) if k == "vec" else x for k, x in FIXED.items()}
        return instructions.made(source, mask, {**captured, **fixed})

    # A table at one batch element is indexed by more than plain positions.
    check(make, used, way="its backward by tiles" if "four[1, h" in source else WAY)


def captured_dtype(captured: dict[str, Tensor]) -> torch.dtype:
    return next((x.dtype for x in captured.values()), torch.float32)


def test_all_instructions_have_a_text() -> None:
    from fused_attn.ops.attention.triton import function_source
    from fused_attn.runtime import native

    if native.why_not() is not None:
        pytest.skip("needs the compiled part")
    special = {"constant", "constant_int", "pow", "select", "select_int", "floor_div_int"}
    special |= {"remainder_int", "load_gradient", "load_visible"}  # the last two are the kernels'
    for name in native.module().PAIR_OPERATIONS:
        plain = name.removesuffix("_int") in function_source._COMPARISONS
        loads = name.startswith(("load_", "gather", "sum_"))
        assert name in function_source._TEXTS or name in special or plain or loads, name


# --- what public code writes ---

OFFSETS = torch.tensor([0, 9, 9, 21, LK])


def jagged(b: Any, h: Any, q: Any, kv: Any) -> Tensor:
    of_q = torch.searchsorted(OFFSETS, q, right=True)
    return of_q == torch.searchsorted(OFFSETS, kv, right=True)


def neighbours(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return ((q // 6 - kv // 6).abs() <= 1) & ((q % 6 - kv % 6).abs() <= 2)


PUBLIC: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "relative bias, dilated window": (
        lambda c: lambda s, b, h, q, kv: s + c["relative"][q - kv + LK],
        lambda b, h, q, kv: (q + 20 >= kv) & ((q - kv) % 3 == 0),
        ("relative",),
    ),
    "temperature and bias per head, neighbours": (
        lambda c: lambda s, b, h, q, kv: s * c["scales"][h] + c["apart"][h, kv - q + LQ],
        neighbours,
        ("scales", "apart"),
    ),
    "stochastic depth, jagged offsets": (
        lambda c: lambda s, b, h, q, kv: torch.where(FIXED["bits"][b, h, q, kv], s, -1e4),
        jagged,
        (),
    ),
    "tanh of the distance, by head": (
        lambda c: lambda s, b, h, q, kv: s + torch.tanh((q - kv) / 10.0),
        lambda b, h, q, kv: (q >= kv) | (h % 2 == 0),
        (),
    ),
    "alibi, learned, and rows that see nothing": (
        lambda c: lambda s, b, h, q, kv: s + c["scales"][h] * (kv - q),
        lambda b, h, q, kv: (q > kv) & (q != 5),
        ("scales",),
    ),
    "table by positions in another order": (
        lambda c: lambda s, b, h, q, kv: s + c["turned"][kv, h, q],
        None,
        ("turned",),
    ),
}
CAPTURED = {
    "relative": normal(LQ + LK, seed=21),
    "apart": normal(H, LQ + LK, seed=22),
    "scales": normal(H, seed=23).abs(),
    "turned": normal(LK + 2, H, LQ + 1, seed=24),  # with room
}


def public(name: str) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    score, mask, names = PUBLIC[name]
    return lambda captured: (score(captured), mask), {n: CAPTURED[n] for n in names}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name: str) -> None:
    check(*public(name))


@pytest.mark.parametrize("name", list(PUBLIC)[:2])
def test_float16(name: str) -> None:
    check(*public(name), dtype=torch.float16)


@pytest.mark.every
@settings(max_examples=4, deadline=None, derandomize=True)
@given(expressions.EXPRESSIONS, expressions.MASKS)
def test_random_expressions(source: str, mask: str) -> None:
    def make(captured: dict[str, Tensor]) -> tuple[Any, Any]:
        text = source.replace("table[h][q]", "table[h, q]")
        score = expressions.function_of(f"({text}) + 0 * s", "s, b, h, q, kv", **captured)
        # More than an operand, so that it always is for the kernels' loop.
        whole = f"({mask}) & ((q * kv) % 7 != 3)"
        return score, expressions.function_of(whole, "b, h, q, kv", **captured)

    e = expressions
    learned = {"table": e.TABLE, "vector": e.VECTOR}
    check(make, learned, (e.B, e.H, e.H, e.LQ, e.LK, e.D))


# --- lists of blocks ---


def listed(size: tuple[int, int], batch: Any = None) -> Any:
    return lambda mask_mod: create_block_mask(
        mask_mod, batch, H, LQ, LK, device="cpu", BLOCK_SIZE=size
    )


@pytest.mark.parametrize(("size", "batch"), [((16, 16), None), ((8, 16), B), ((64, 128), None)])
def test_listed_blocks(size: tuple[int, int], batch: Any) -> None:
    def make(captured: dict[str, Tensor]) -> tuple[Any, Any]:
        return (lambda s, b, h, q, kv: s * s), lambda b, h, q, kv: (q + 4 * h >= kv) & (kv % 5 != 2)

    check(make, {}, blocks=listed(size, batch))


def test_lists_that_say_less_or_more_than_the_function() -> None:
    own = torch.arange(3, dtype=torch.int32).view(1, 1, 3, 1).expand(1, 1, 3, 3).contiguous()
    one, none = torch.ones(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32)
    for lists in ((one, own), (none, own, one, own)):
        full = len(lists) > 2

        def make(captured: Any, full: bool = full) -> tuple[Any, Any]:
            def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
                return (q // 16 == kv // 16) & (full | (q >= kv))

            return (lambda s, b, h, q, kv: s * s), mask

        def blocks(mask: Any, lists: Any = lists) -> Any:
            causal = lambda b, h, q, kv: q >= kv  # noqa: E731
            return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=causal)

        check(make, {}, (1, 1, 1, 48, 48, D), blocks=blocks)


def test_the_map_of_blocks() -> None:
    from fused_attn.ops.attention.triton.function_terms import block_cells

    generator = torch.Generator().manual_seed(3)
    for size in ((16, 32), (8, 16), (24, 40), (128, 5)):
        grid = [-(-n // s) for n, s in zip((70, 150), size, strict=True)]
        kinds = torch.randint(0, 3, (2, 1, *grid), generator=generator)
        kinds = torch.where(torch.rand(kinds.shape, generator=generator) < 0.6, 0, kinds)
        wide = kinds.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., :70, :150]
        shown = torch.nn.functional.pad((wide != 0).float(), (0, 10, 0, 10))
        wanted = torch.nn.functional.max_pool2d(shown, 16) > 0
        cells, whole = block_cells(kinds, size, 70, 150)
        assert whole == tuple(cells.shape[2:]) == (5, 10)
        missed = wanted & (cells == 0)
        assert not missed.any(), size
        if size[0] % 16 == 0 and size[1] % 16 == 0:
            assert torch.equal(cells != 0, wanted), size


# --- few queries; other ways; what is wrong ---


@pytest.mark.parametrize("blocks", [None, listed((16, 128)), listed((16, 128), B)])
def test_few_queries(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.ops.attention.triton import launch

    ran = []
    decode = launch._decode
    monkeypatch.setattr(launch, "_decode", lambda *a: ran.append(1) or decode(*a))
    q, k = normal(B, 2, 3, D, seed=1).float(), normal(B, 1, 600, D, seed=2).float()
    score = lambda s, b, h, i, j: s * s.abs() * (1 + h)  # noqa: E731
    mask = lambda b, h, i, j: ((i * j) % 3 != 1) & (j >= 100 * h)  # noqa: E731
    given = mask
    if blocks is not None:
        own = None if blocks.__closure__[0].cell_contents is None else B
        given = create_block_mask(mask, own, 2, 3, 600, device="cpu", BLOCK_SIZE=(16, 128))
    out = flex_attention(q, k, k, score, given, scale=0.3, enable_gqa=True)
    wanted, _ = oracle(tuple(x.double() for x in (q, k, k)), score, mask, 0.3)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    assert ran


def test_tables_that_are_indexed_otherwise_have_their_gradient_by_tiles() -> None:
    def make(captured: dict[str, Tensor]) -> tuple[Any, Any]:
        return (lambda s, b, h, q, kv: s + captured["table"][(q * kv) % 9]), None

    check(make, {"table": normal(9, seed=5)}, way="its backward by tiles: wants the gradient of")


def test_an_index_outside_of_its_table_shows() -> None:
    q = normal(1, 1, 4, D, seed=1).float()
    table, whole = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    for bad in (
        (lambda s, b, h, i, j: s + table[i * j], None),
        (None, lambda b, h, i, j: whole[i * j] == 0),
    ):
        out = flex_attention(q, q, q, *bad)
        assert torch.equal(out[0, 0].isnan().any(-1), torch.tensor([False, False, True, True]))


def test_a_mistake_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.ops.attention.triton import function_source

    name = "tanh of the distance, by head"
    monkeypatch.setitem(function_source._TEXTS, "add", "{0} + 1.01 * {1}")
    with pytest.raises(AssertionError, match="result"):
        check(*public(name))


def test_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_ATTN_BACKENDS")
    q = torch.zeros(1, 1, 4, D)
    backend, _ = compiled._backend((q, q, q))
    assert getattr(backend, "NAME", None) != "triton"
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "triton")
    backend, _ = compiled._backend((q, q, q))
    assert backend.NAME == "triton"
    assert compiled._backend((q.double(),))[0] is not backend


def test_equal_texts_are_compiled_once() -> None:
    from fused_attn.ops.attention.triton import function_source

    q = torch.zeros(1, 1, 4, D)
    found = []
    for length in (4, 6):  # lengths are no part of the text
        k = torch.zeros(1, 1, length, D)
        before = function_source._compiled.cache_info().misses
        flex_attention(q, k, k, lambda s, b, h, i, j: s * s - (i - j).abs() * 0.25)
        found.append(function_source._compiled.cache_info().misses - before)
    assert found == [1, 0]
