"""Functions in the kernels' own loop: every instruction, its derivative, and where it is used."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import explain, flex_attention
from fused_attn.flex import api, blocks, compiled, derivative, pairs
from fused_attn.flex.expression import MASK_INPUTS, SCORE_INPUTS
from fused_attn.runtime import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="needs the compiled part")

# Two blocks of queries and two tiles of keys, both with a remainder; heads that share keys.
B, H, LQ, LK, D = 2, 2, 70, 150, 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


LEARNED = {
    "pair": normal(LQ, LK, seed=1),  # by both positions
    "four": normal(B, H, LQ, LK, seed=2),
    "vec": normal(50, seed=3),
    "head": normal(H, seed=4),
    "of_q": normal(B, LQ, seed=5),
    "of_k": normal(H, LK, seed=6),
    "apart": normal(H, LQ + LK, seed=7),
}
FIXED = {
    "ids": torch.randint(0, 50, (LQ, LK), generator=torch.Generator().manual_seed(8)),
    "bits": normal(B, H, LQ, LK, seed=9) > 0,
    "half": normal(LQ, LK, seed=10).bfloat16(),
}

SCORES = """
s * torch.exp(s * 0.3)
torch.exp2(s * 0.2) + torch.log2(s.abs() + 1.5)
torch.log(s * s + 0.5) + torch.log1p(s.abs()) - torch.expm1(0.2 * s)
torch.sin(s) * torch.cos(s + pair[q, kv])
torch.tanh(s) + torch.sigmoid(3 * s) * torch.erf(s)
torch.sqrt(s * s + 1) + torch.rsqrt(s * s + 1) - 1 / (s * s + 2)
s**2 - 0.1 * s**3 + (s * s + 0.3) ** 1.7 + (s * s + 1) ** 0.5 + (s * s + 1) ** -1
torch.nn.functional.silu(s) + torch.relu(s - 0.1)
s + torch.sign(s) + torch.floor(s) * 0.1 + torch.ceil(s) * s + torch.trunc(3 * s)
s.clamp(-0.5, 0.7) + 2 * s.clamp(min=0.1) + s.clamp_max(0.2) * 3
torch.maximum(s, pair[q, kv]) - torch.minimum(s, head[h] + 0 * s)
torch.where((s > 0.1) | ~(s >= -0.2), s * pair[q, kv], -s)
torch.where((s < 0.1) & (s != pair[q, kv]) ^ (s == pair[q, kv]), s, 2 * s)
s.masked_fill(bits[b, h, q, kv], -1e4) + torch.where(s <= pair[q, kv], 0.5, 0.0)
s * s.detach() - s.abs() * four[b, h, q, kv] + four[b][h][q, kv]
s / (pair[q, kv] ** 2 + 1) + half[q, kv]
s + vec[ids[q, kv]] * vec[(q * kv + kv) % 50]
s + vec[-1 - (q * kv) % 7] + vec[(q * kv // 9).clamp(max=49)]
s + vec[torch.div(q * kv, 300, rounding_mode="trunc").abs()] * (-(q * kv)).sign()
s + vec[torch.where(q * kv > 40, 3, ids[q, kv])] + vec[torch.minimum(q, kv) & 31]
s + vec[torch.maximum(q, kv) % 50] + vec[(q ^ kv) % 50] * vec[(q | kv) % 8]
s + 0.001 * (q * kv) - (-(q * kv) - 40 * kv).abs() * 0.002
s + (~(q * kv) % 5) * 0.1 + torch.where((q * kv == 6) | (q * kv != 8), 0.1, 0.2)
s + torch.where((q * kv < 60) & (q * kv <= 50) & (q * kv >= 8), of_q[b, q], of_k[h, kv])
s * head[h] + of_q[b][q] * of_k[h][kv] + apart[h, q - kv + 150]
s + apart[h, kv - q + 70] * s - torch.tanh((q - kv) / 10) * of_q[b, q]
torch.ones_like(s) * s + torch.full_like(s, 0.5) - s.clone()
1.0 - s + s.float().to(s.dtype) * (s > 0) + of_q[0, q] + four[1, h, q, kv]
0.3 * of_q[b, q] - of_k[h, kv] + 0 * s
"""
SCORES = [line for line in SCORES.splitlines() if line]
MASKS = [None, "q + 20 >= kv", "bits[b, h, q, kv]", "(q * kv) % 3 != 1", "(kv % 4 < 3) & (q != 65)"]


def function_of(source, names, values):
    return eval(f"lambda {names}: {source}", {"torch": torch, **values})


def made(source, mask, values):
    score_mod = function_of(f"({source}) + 0 * s", "s, b, h, q, kv", values)
    return score_mod, None if mask is None else function_of(mask, "b, h, q, kv", values)


def reasons(score_mod, mask_mod, q, k, v):
    score = api._read(score_mod, SCORE_INPUTS, "score_mod", q)
    mask = api._read(mask_mod, MASK_INPUTS, "mask_mod", q)
    return compiled.why_not(api._call(score, mask, mask_mod, 0.5, q, k), q, k, v)


def oracle(q, k, v, source, mask, values):
    """The formula on all pairs."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * 0.5
    places = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    flat = {"four[b][h]": "four[b, h]", "of_q[b][q]": "of_q[b, q]", "of_k[h][kv]": "of_k[h, kv]"}
    for nested, plain in flat.items():
        source = source.replace(nested, plain).replace("four[b, h][q, kv]", "four[b, h, q, kv]")
    score_mod, mask_mod = made(source, mask, values)
    scores = score_mod(scores, *places)
    if mask_mod is not None:
        scores = scores.masked_fill(~mask_mod(*places), -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def points(dtype, seqlen_q=LQ):
    shapes = ((B, H, seqlen_q, D), (B, 1, LK, D), (B, 1, LK, D))
    qkv = [normal(*shape, seed=20 + n) for n, shape in enumerate(shapes)]
    return [x.to(dtype).requires_grad_() for x in qkv]


def close(source, mask, dtype):
    """Whether ours, with every gradient, is what the formula in float64 gives."""
    results = []
    for ours in (True, False):
        kind = dtype if ours else torch.float64
        q, k, v = points(kind)
        learned = {n: x.to(kind).requires_grad_() for n, x in LEARNED.items()}
        values = {**learned, **FIXED}
        if ours:
            out = flex_attention(q, k, v, *made(source, mask, values), scale=0.5, enable_gqa=True)
        else:
            out = oracle(q, k, v, source, mask, values)
        inputs = [q, k, v, *learned.values()]
        dout = normal(*out.shape, seed=30).to(out.dtype)
        grads = torch.autograd.grad(out, inputs, dout, allow_unused=True)
        zeros = [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
        ]
        results.append([out, *zeros])
    # Positions are float32 in torch whatever the scores are.
    bound = 1e-7 if dtype == torch.float64 else 1e-4
    return all(
        torch.allclose(
            a.double(), b.double(), rtol=bound, atol=bound * (1 + b.detach().abs().max().item())
        )
        for a, b in zip(*results, strict=True)
    )


def test_every_instruction_and_its_derivative(monkeypatch):
    used = set()

    def recorded(*args, **options):
        written = pairs.program(*args, **options)
        used.update(written[1:, 0].tolist())
        return written

    monkeypatch.setattr(compiled, "program", recorded)
    for n, source in enumerate(SCORES):
        mask = MASKS[n % len(MASKS)]
        for dtype in (torch.float32, torch.float64)[: 1 + n % 2]:
            values = {**{n: x.to(dtype) for n, x in LEARNED.items()}, **FIXED}
            q, k, v = points(dtype)
            against = reasons(*made(source, mask, values), q, k, v)
            # What torch computes in float32 alone, next to float64, goes by tiles.
            assert not against or dtype == torch.float64, (source, against)
            assert close(source, mask, dtype), (source, mask, dtype)
    names = native.module().PAIR_OPERATIONS
    assert {names[code] for code in used} == set(names)


@pytest.mark.parametrize("name", ["tanh", "mul", "select", "gather", "block", "sum"])
def test_a_mistake_would_be_seen(name, monkeypatch):
    source = "torch.where(s > 0.1, torch.tanh(s) * pair[q, kv], s) + apart[h, q - kv + 150]"
    assert close(source, None, torch.float32)
    rules = derivative.RULES
    if name in rules:
        right = rules[name]
        monkeypatch.setitem(
            rules,
            name,
            lambda build, x, g: right(build, x, build.mul(g, build.number(1.01))),
        )
    elif name == "gather":
        table = LEARNED["pair"].clone()
        table[69, 149] += 1.0  # one number, in the corner of the last tile
        assert not same_output(source, {"pair": table})
        return
    elif name == "sum":
        monkeypatch.setitem(compiled._SUMS, "distance", "sum_key")
        source += " + apart[h, q - kv + 150]"
    else:
        kinds = blocks.kinds_of
        monkeypatch.setattr(blocks, "kinds_of", lambda mask: kinds(mask).roll(1, -1))
        assert not blocks_agree()
        return
    assert not close(source, None, torch.float32)


def same_output(source, changed):
    q, k, v = points(torch.float32)
    found = []
    for values in (LEARNED, {**LEARNED, **changed}):
        given = {n: x.float() for n, x in values.items()}
        out = flex_attention(q, k, v, *made(source, None, {**given, **FIXED}), enable_gqa=True)
        found.append(out)
    return torch.equal(*found)


def blocks_agree(size=(32, 16)):
    q, k, v = points(torch.float32)
    values = {n: x.float() for n, x in LEARNED.items()} | FIXED
    score_mod, mask_mod = made("s * s", "(q + 20 >= kv) & ((q * kv) % 3 != 1)", values)
    blocks = create_block_mask(mask_mod, None, None, LQ, LK, device="cpu", BLOCK_SIZE=size)
    found = [
        flex_attention(q, k, v, score_mod, mask, enable_gqa=True) for mask in (mask_mod, blocks)
    ]
    return torch.allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 16), (128, 64), (8, 128)])
def test_listed_blocks(size):
    assert blocks_agree(size)


def test_indices_outside_of_their_table():
    q, k, v = points(torch.float32)
    vec = torch.zeros(50)
    for bad in (lambda s, b, h, q, kv: s + vec[q * kv], lambda s, b, h, q, kv: s + vec[-q * kv]):
        with pytest.raises(IndexError, match="out of bounds"):
            flex_attention(q, k, v, bad, enable_gqa=True)
    with pytest.raises(IndexError):
        flex_attention(q, k, v, lambda s, b, h, q, kv: s + vec[kv], enable_gqa=True)


def test_what_has_no_instruction_goes_by_tiles():
    q, k, v = points(torch.float32)
    unknown = {
        "lgamma": lambda s, b, h, q, kv: s + torch.lgamma(s.abs() + 1),
        "float64": lambda s, b, h, q, kv: (s.double() * 2).float(),
        "32 bits": lambda s, b, h, q, kv: s + 1e-12 * (q * kv * 1000000),
        "bfloat16": lambda s, b, h, q, kv: s + FIXED["half"][q, kv] * 2,
    }
    for word, score_mod in unknown.items():
        assert word in str(reasons(score_mod, None, q, k, v)), word
        [said] = explain(flex_attention, q, k, v, score_mod, enable_gqa=True).notes
        assert said.startswith("runs by tiles: ")
        assert word in said
        flex_attention(q, k, v, score_mod, enable_gqa=True).sum().backward()
    square = explain(flex_attention, q, k, v, lambda s, b, h, i, j: s * s, enable_gqa=True)
    assert square.notes[0] == "runs in the kernel's own loop"
    assert square.notes[1].startswith("functions are interpreted: ")  # few pairs, or no llvmlite
    known = explain(flex_attention, q, k, v, None, lambda b, h, i, j: i >= j, enable_gqa=True)
    assert known.notes == ()
    [call] = known.calls
    assert "causal=upper_left" in str(call)
    meta = q.detach().to("meta")
    assert any("has no kernel that runs functions" in x for x in compiled._backend([meta])[1])


def test_who_watches_operators_sees_them():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        pass

    q, k, v = (x.detach() for x in points(torch.float32))
    square = lambda s, b, h, i, j: s * s  # noqa: E731
    wanted = flex_attention(q, k, v, square, enable_gqa=True)
    seen = []
    with Watch():
        watched = flex_attention(q, k, v, square, enable_gqa=True)
    assert torch.ops.aten.exp.default in seen
    torch.testing.assert_close(watched, wanted)
    marked = flex_attention(q.as_subclass(Marked), k, v, square, enable_gqa=True)
    torch.testing.assert_close(marked.as_subclass(torch.Tensor), wanted)


def test_gradients_do_not_depend_on_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            q, k, v = points(torch.float32)
            learned = {n: x.float().requires_grad_() for n, x in LEARNED.items()}
            mods = made(SCORES[24], MASKS[3], {**learned, **FIXED})
            out = flex_attention(q, k, v, *mods, enable_gqa=True)
            inputs = [q, k, v, *learned.values()]
            found.append(torch.autograd.grad(out.sum(), inputs, allow_unused=True))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("seqlen_q", [1, 5, 16, 17, 64])
def test_few_queries(seqlen_q):
    q, k, v = points(torch.float32, seqlen_q)
    score_mod, mask_mod = made("s * s.abs()", "(q * kv) % 3 != 1", {})
    out = flex_attention(q, k, v, score_mod, mask_mod, scale=0.5, enable_gqa=True)
    wanted = oracle(*(x.double() for x in (q, k, v)), "s * s.abs()", "(q * kv) % 3 != 1", {})
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_keys_that_nobody_sees_may_be_nan():
    q, k, v = (x.detach() for x in points(torch.float32))
    score_mod, mask_mod = made("s * s", "((q * kv) % 3 != 1) & (kv + 0 * q != 77)", {})
    wanted = flex_attention(q, k, v, score_mod, mask_mod, enable_gqa=True)
    k[:, :, 77], v[:, :, 77] = torch.nan, torch.inf
    got = flex_attention(q, k, v, score_mod, mask_mod, enable_gqa=True)
    torch.testing.assert_close(got, wanted)


def test_scores_as_large_as_they_get():
    """An lse that has lost its bits: the backward finds the largest score and the sum again."""
    q, k, v = points(torch.float32)
    out = flex_attention(q, k, v, lambda s, b, h, i, j: s - 1e9 * (j >= 0), enable_gqa=True)
    wanted = flex_attention(q, k, v, lambda s, b, h, i, j: 0 * s, enable_gqa=True)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    mine, his = (torch.autograd.grad(x.sum(), v)[0] for x in (out, wanted))
    torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", ["portable"])
def test_the_slowest_level(level):
    code = (
        "import torch; from tests.flex import test_compiled as t\n"
        "for n in range(0, len(t.SCORES), 4):\n"
        "    assert t.close(t.SCORES[n], t.MASKS[n % 5], torch.float32), t.SCORES[n]\n"
        "assert t.blocks_agree()\n"
    )
    env = {**os.environ, "FUSED_ATTN_CPU": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scale_of_one_is_default_too():
    q, k, v = points(torch.float32)
    default = flex_attention(q, k, v, lambda s, b, h, i, j: s * s, enable_gqa=True)
    named = flex_attention(
        q, k, v, lambda s, b, h, i, j: s * s, scale=1 / math.sqrt(D), enable_gqa=True
    )
    assert torch.equal(default, named)
