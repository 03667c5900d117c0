"""FlexAttention's interface against float64, on every kind of function that public code writes."""

import math

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    or_masks,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import flex_attention
from fused_attn.flex import api, compiled, known
from fused_attn.flex.expression import MASK_INPUTS, SCORE_INPUTS, read

B, H, L, D = 2, 4, 40, 8


def normal(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def oracle(q, k, v, score_mod=None, mask_mod=None, scale=None):
    """Pair by pair in float64, the functions called by torch.vmap as torch defines them."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    sizes = scores.shape
    places = [
        torch.arange(n).view([-1 if i == d else 1 for i in range(4)]).expand(sizes).flatten()
        for d, n in enumerate(sizes)
    ]
    with TransformGetItemToIndex():
        if score_mod is not None:
            scores = torch.vmap(score_mod)(scores.flatten(), *places).view(sizes)
        if mask_mod is not None:
            visible = torch.vmap(mask_mod)(*places).view(sizes)
            scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))
    return weights @ v, scores.logsumexp(-1)


DOCUMENTS = torch.tensor([0] * 11 + [1] * 3 + [2] * 20 + [1] * 6)
BATCH_DOCUMENTS = torch.stack([DOCUMENTS, torch.arange(L) // 7])
PREFIX, LENGTHS = torch.tensor([5, 17]), torch.tensor([40, 23])
OFFSETS = torch.tensor([0, 9, 9, 30, L])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def document(b, h, q_idx, kv_idx):
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def window(b, h, q_idx, kv_idx):
    return q_idx - kv_idx <= 7


MASKS = {
    "causal": causal,
    "window": and_masks(causal, window),
    "window both ways": lambda b, h, q, kv: (q - kv).abs() <= 5,
    "document": document,
    "document of the batch": lambda b, h, q, kv: BATCH_DOCUMENTS[b, q] == BATCH_DOCUMENTS[b][kv],
    "document and causal": and_masks(document, causal),
    "prefix": or_masks(causal, lambda b, h, q, kv: kv < PREFIX[b]),
    "lengths": lambda b, h, q, kv: kv < LENGTHS[b],
    "chunk": lambda b, h, q, kv: (q // 8 == kv // 8) & (q >= kv),
    "a number of keys": lambda b, h, q, kv: (kv < 30) & (q >= kv),
    "neighbours in two dimensions": lambda b, h, q, kv: (
        ((q // 8 - kv // 8).abs() <= 1) & ((q % 8 - kv % 8).abs() <= 2)
    ),
    "dilated window": lambda b, h, q, kv: (q >= kv) & (q - kv <= 12) & ((q - kv) % 3 == 0),
    "jagged offsets": lambda b, h, q, kv: (
        torch.searchsorted(OFFSETS, q, right=True) == torch.searchsorted(OFFSETS, kv, right=True)
    ),
    "by head": lambda b, h, q, kv: (q >= kv) | (h % 2 == 0),
    "a captured mask": lambda b, h, q, kv: CAPTURED[b, h, q, kv],
    "nothing for some": lambda b, h, q, kv: (q > kv) & (q != 20),
}
KNOWN = list(MASKS)[:10]
CAPTURED = normal(B, H, L, L, seed=8) > 0


def test_a_gradient_of_lse_by_tiles():
    """What no kernel has an instruction for, and what is more than an addition to the score."""

    def changed(score, b, h, q_idx, kv_idx):
        return score * (1.0 + 0.1 * torch.lgamma(score.abs() + 1.0))

    q, k, v = (normal(B, H, L, D, seed=s, grad=True) for s in range(3))
    dlse = normal(B, H, L, seed=7)
    _, lse = flex_attention(q, k, v, changed, return_lse=True)
    mine = torch.autograd.grad(lse, (q, k), dlse)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    his = torch.autograd.grad(oracle(*exact, changed)[1], exact[:2], dlse.double())
    for found, wanted in zip(mine, his, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", ["function", "16", "8x16"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, blocks):
    mask_mod = MASKS[name]
    q, k, v = (normal(B, H, L, D, seed=s, grad=True) for s in range(3))
    dout, dlse = normal(B, H, L, D, seed=9), normal(B, H, L, seed=7)
    mask = mask_mod
    if blocks != "function":
        size = 16 if blocks == "16" else (8, 16)
        mask = create_block_mask(mask_mod, B, H, L, L, device="cpu", BLOCK_SIZE=size)
    out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    wanted, wanted_lse = oracle(q, k, v, None, mask_mod)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=2e-6)
    dlse = dlse.masked_fill(wanted_lse == -torch.inf, 0.0)
    mine = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        visible = torch.isfinite(oracle(q, k, v, None, mask_mod)[1])
    wanted, wanted_lse = oracle(*exact, None, mask_mod)
    loss = (wanted * dout).sum() + (wanted_lse[visible] * dlse[visible]).sum()
    his = torch.autograd.grad(loss, exact)
    if visible.all():
        torch.testing.assert_close([x.double() for x in mine], list(his), rtol=1e-4, atol=1e-5)
    else:
        assert all(x.isfinite().all() for x in mine)


def test_known_masks_are_operands_and_others_are_not():
    q = k = torch.empty(B, H, L, D)
    for name, mask_mod in MASKS.items():
        mask = known.mask_of(read(mask_mod, MASK_INPUTS, "mask_mod", q))
        found = None if mask is None else mask.operands(q, k)
        assert (found is not None) == (name in KNOWN), name


def make_scores():
    """Changes of scores and the captured tensors that want a gradient."""
    relative = normal(2 * L, seed=3, grad=True)
    per_head = normal(H, 2 * L, seed=4, grad=True)
    temperature = torch.rand(H).add(0.5).requires_grad_()
    slopes = SLOPES.clone().requires_grad_()
    bits = normal(B, H, L, L, seed=6) > -1
    return {
        "nothing": (lambda s, b, h, q, kv: s, []),
        "softcap": (lambda s, b, h, q, kv: 5.0 * torch.tanh(s / 5.0), []),
        "alibi": (lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q), []),
        "alibi both ways": (lambda s, b, h, q, kv: s - SLOPES[h] * (q - kv).abs(), []),
        "alibi, learned": (lambda s, b, h, q, kv: s + slopes[h] * (kv - q), [slopes]),
        "softcap and bias": (
            lambda s, b, h, q, kv: 2.0 * torch.tanh(s / 2.0) + relative[q - kv + L],
            [relative],
        ),
        "relative bias": (lambda s, b, h, q, kv: s + relative[q - kv + L], [relative]),
        "bias per head": (lambda s, b, h, q, kv: s + per_head[h, kv - q + L], [per_head]),
        "temperature": (lambda s, b, h, q, kv: s * temperature[h], [temperature]),
        "tanh of the distance": (lambda s, b, h, q, kv: s + torch.tanh((q - kv) / 10.0), []),
        "square": (lambda s, b, h, q, kv: s * s.abs() * 0.3, []),
        "causal in the score": (lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf")), []),
        "stochastic depth": (lambda s, b, h, q, kv: torch.where(bits[b, h, q, kv], s, -1e4), []),
        "two learned": (
            lambda s, b, h, q, kv: s * temperature[h] + relative[q - kv + L],
            [temperature, relative],
        ),
    }


@pytest.mark.parametrize("name", make_scores())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["kernel", "tiles"])
def test_changes_of_scores_and_every_gradient(name, masked, way, monkeypatch):
    if way == "tiles":
        monkeypatch.setattr(compiled, "_backend", lambda tensors: (None, []))
    score_mod, learned = make_scores()[name]
    q = normal(B, H, L, D, seed=0, grad=True)
    k, v = (normal(B, 2, L, D, seed=s, grad=True) for s in (1, 2))
    dout = normal(B, H, L, D, seed=9)
    mask_mod = and_masks(causal, document) if masked else None
    mask = None
    if masked:
        mask = create_block_mask(mask_mod, None, None, L, L, device="cpu", BLOCK_SIZE=16)
    out = flex_attention(q, k, v, score_mod, mask, enable_gqa=True)
    inputs = (q, k, v, *learned)
    mine = torch.autograd.grad(out, inputs, dout)
    wanted, _ = oracle(q, k, v, score_mod, mask_mod)
    his = torch.autograd.grad(wanted, inputs, dout.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=3e-6)
    for a, b in zip(mine, his, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["alibi", "relative bias", "square"])
def test_dtypes_and_other_lengths(dtype, name):
    score_mod, learned = make_scores()[name]
    q, k, v = (normal(1, H, n, D, seed=n).to(dtype).requires_grad_() for n in (19, 30, 30))
    out = flex_attention(q, k, v, score_mod, scale=0.4)
    grads = torch.autograd.grad(out.sum(), (q, k, v, *learned))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted, _ = oracle(*exact, score_mod, None, scale=0.4)
    his = torch.autograd.grad(wanted.sum(), (*exact, *learned))
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2
    for a, b in zip((out, *grads), (wanted, *his), strict=True):
        bound = max(tolerance, 1e-4) if a.dtype == torch.float32 else tolerance
        torch.testing.assert_close(a.double(), b.double(), rtol=bound, atol=bound)


def test_indices_may_be_given_one_after_the_other():
    table = normal(B, H, L, seed=4, grad=True)
    q = normal(B, H, L, D)
    found = []
    for score_mod in (
        lambda s, b, h, q, kv: s + table[b, h, q] - table[b, 0, kv],
        lambda s, b, h, q, kv: s + table[b][h][q] - table[b][0][kv],
        lambda s, b, h, q, kv: s + table[b][:, q][h] - table[:, 0][b][kv],
    ):
        out = flex_attention(q, q, q, score_mod)
        found.append((out, *torch.autograd.grad(out.square().sum(), table)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("name", ["nothing", "relative bias", "square", "two learned"])
def test_autocast_is_that_of_a_product(name):
    score_mod, learned = make_scores()[name]
    q, k, v = (normal(1, H, L, D, seed=s, grad=True) for s in range(3))
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    wanted = flex_attention(*half, score_mod, causal)
    his = torch.autograd.grad(wanted.sum(), (*half, *learned))
    with torch.autocast("cpu", torch.bfloat16):
        out = flex_attention(q, k, v, score_mod, causal)
        mine = torch.autograd.grad(out.sum(), (q, k, v, *learned))  # even within it
    assert torch.equal(out, wanted)
    for a, b in zip(mine, his, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


def test_second_derivatives_and_torch_func():
    score_mod, _ = make_scores()["two learned"]
    q, k, v = (normal(1, H, 9, D, seed=s).double().requires_grad_() for s in range(3))
    call = lambda q, k, v: flex_attention(q, k, v, score_mod, causal)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (q, k, v))
    wanted, _ = oracle(q, k, v, score_mod, causal)
    torch.testing.assert_close(torch.func.vmap(call)(*(x[None] for x in (q, k, v)))[0], wanted)
    grad = torch.func.grad(lambda q: call(q, k, v).sum())(q)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), q)[0])


def test_lists_that_say_less_or_more_than_the_function():
    """Blocks that somebody listed by himself decide, as in torch."""
    blocks = torch.zeros(1, 1, 5, dtype=torch.int32)
    blocks[..., :] = 1
    own = torch.arange(5, dtype=torch.int32).view(1, 1, 5, 1).expand(1, 1, 5, 5).contiguous()
    q, k, v = (normal(B, H, L, D, seed=s) for s in range(3))
    less = BlockMask.from_kv_blocks(blocks, own, BLOCK_SIZE=8, mask_mod=causal)
    wanted, _ = oracle(q, k, v, None, lambda b, h, q, kv: (q // 8 == kv // 8) & (q >= kv))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=less), wanted.float())
    more = BlockMask.from_kv_blocks(blocks * 0, own, blocks, own, BLOCK_SIZE=8, mask_mod=causal)
    wanted, _ = oracle(q, k, v, None, lambda b, h, q, kv: q // 8 == kv // 8)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=more), wanted.float())


def test_what_nobody_sees_has_no_effect():
    for score_mod in (None, lambda s, b, h, q, kv: s * s):
        q, k, v = (normal(1, H, L, D, seed=s) for s in range(3))
        mask_mod = lambda b, h, q, kv: (kv < 20) & (kv % 2 == 0)  # noqa: E731
        wanted = flex_attention(q, k, v, score_mod, mask_mod)
        k[:, :, 25], v[:, :, 30] = torch.nan, torch.inf
        torch.testing.assert_close(flex_attention(q, k, v, score_mod, mask_mod), wanted)


def test_auxiliary_outputs():
    q, k, v = (normal(B, H, L, D, seed=s) for s in range(3))
    score_mod, _ = make_scores()["softcap"]
    out, aux = flex_attention(
        q, k, v, score_mod, causal, return_aux=AuxRequest(lse=True, max_scores=True)
    )
    wanted, lse = oracle(q, k, v, score_mod, causal)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(aux.lse.double(), lse, rtol=1e-5, atol=2e-6)
    scores = 5.0 * torch.tanh(q @ k.mT / math.sqrt(D) / 5.0)
    peak = scores.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), -torch.inf).amax(-1)
    torch.testing.assert_close(aux.max_scores, peak)


def test_a_function_is_read_once_and_again_when_bound_anew(monkeypatch):
    reads = []
    inner = api.cache.read
    monkeypatch.setattr(api.cache, "read", lambda *a: reads.append(1) or inner(*a))
    q = normal(1, H, L, D)

    def biased(table, factor):
        return lambda s, b, h, q, kv: s + factor * table[h]

    table = normal(H, seed=3)
    first = flex_attention(q, q, q, biased(table, 2.0))
    again = flex_attention(q, q, q, biased(table, 2.0))
    assert torch.equal(first, again)
    assert len(reads) == 1
    flex_attention(q, q, q, biased(table, 3.0))
    flex_attention(q, q, q, biased(table.clone(), 2.0))
    assert len(reads) == 3

    def rebound(s, b, h, q, kv):
        return s + limit * (q >= kv)

    limit = 0.0
    wanted, _ = oracle(q, q, q, rebound)
    torch.testing.assert_close(flex_attention(q, q, q, rebound), wanted.float())
    limit = 5.0
    wanted, _ = oracle(q, q, q, rebound)
    torch.testing.assert_close(flex_attention(q, q, q, rebound), wanted.float())
    global GLOBAL
    nested = lambda s, b, h, q, kv: (lambda x: x * GLOBAL)(s)  # noqa: E731
    for GLOBAL in (1.0, 3.0):  # noqa: B007
        wanted, _ = oracle(q, q, q, nested)
        torch.testing.assert_close(flex_attention(q, q, q, nested), wanted.float())
    with torch.no_grad():
        table += 100.0 * torch.arange(H)  # in place: the same tensor, other numbers
    scaled = lambda s, b, h, q, kv: s * table[h]  # noqa: E731
    wanted, _ = oracle(q, q, q, scaled)
    got = flex_attention(q, q, q, scaled).double()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_default_dtype_is_that_of_the_call():
    q = normal(1, H, L, D).double()
    before, found = torch.get_default_dtype(), []
    mods = (lambda s, b, h, q, kv: s + (q * kv * 0.1).sin() * s, lambda b, h, q, kv: q >= kv)
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            found.append(flex_attention(q, q, q, *mods))
            wanted, _ = oracle(q, q, q, *mods)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found[1], wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*found, rtol=1e-12, atol=1e-12)


def test_torchs_function_becomes_ours():
    from torch.nn.attention import flex_attention as torch_flex

    from fused_attn.integrations import flex

    stock = torch_flex.flex_attention
    q = normal(1, H, L, D, grad=True)
    with flex.activated():
        assert flex.is_active()
        out = torch_flex.flex_attention(q, q, q, block_mask=causal)
        torch.autograd.grad(out.sum(), q)  # which torch's has not on a CPU
    assert torch_flex.flex_attention is stock
    flex.restore()


class Watch(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("name", ["square", "relative bias"])
def test_memory_is_not_that_of_all_pairs(name):
    length = 1024
    q, table = normal(1, 1, length, 8, grad=True), normal(2 * length, grad=True)
    score_mod = {
        "square": lambda s, b, h, q, kv: s * s,
        "relative bias": lambda s, b, h, q, kv: s + table[q - kv + length],
    }[name]
    with Watch() as watch:
        out = flex_attention(q, q, q, score_mod)
        torch.autograd.grad(out.sum(), q)
    assert watch.largest <= length * 128


def test_names_are_public():
    assert fused_attn.flex_attention is flex_attention
    assert SCORE_INPUTS[1:] == MASK_INPUTS
