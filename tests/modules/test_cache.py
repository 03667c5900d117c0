"""Caches: step by step is the same as all at once, in modules, layers and stacks."""

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn import KeyValueCache, LayerCache, MemoryCache, PagedKeyValueCache

CACHES = {
    "growing": lambda: KeyValueCache(),
    "in one piece": lambda: KeyValueCache(16),
    "pages": lambda: PagedKeyValueCache(4),
    "pages, one each": lambda: PagedKeyValueCache(1, 16),
}
PIECES = (1, 3, 5, 1, 2)  # the positions of each call: 12


def attention(**options):
    torch.manual_seed(0)
    module = fused_attn.FusedMultiheadAttention(16, 4, batch_first=True, **options)
    return module.eval()


def x_of(n=2, length=12, width=16, seed=0):
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    "options", [{}, {"rotary_base": 100.0}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@torch.no_grad()
def test_attention_step_by_step(kind, options):
    module, x = attention(**options), x_of()
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[0, :3] = True  # padding in front, as of prompts
    wanted, weights = module(x, x, x, key_padding_mask=hidden, is_causal=True)
    cache, start = CACHES[kind](), 0
    for size in PIECES:
        end = start + size
        piece = x[:, start:end]
        out, w = module(
            piece, piece, piece, key_padding_mask=hidden[:, :end], is_causal=True, cache=cache
        )
        torch.testing.assert_close(out, wanted[:, start:end])
        if not options.get("add_bias_kv"):
            torch.testing.assert_close(w, weights[:, start:end, :end])
        start = end
        assert cache.length == end


@torch.no_grad()
def test_other_layouts_and_masks():
    for batch_first, batched in ((False, True), (False, False)):
        module = attention()
        module.batch_first = batch_first
        x = x_of().transpose(0, 1) if batched else x_of()[0]
        slopes = -0.3 * (torch.arange(12)[:, None] - torch.arange(12)).abs().float()
        wanted, _ = module(x, x, x, attn_mask=slopes, is_causal=True)
        cache = KeyValueCache()
        first, _ = module(
            x[:7], x[:7], x[:7], attn_mask=slopes[:7, :7], is_causal=True, cache=cache
        )
        rest, _ = module(x[7:], x[7:], x[7:], attn_mask=slopes[7:], is_causal=True, cache=cache)
        torch.testing.assert_close(torch.cat([first, rest]), wanted)


def test_gradients_reach_through_a_cache():
    module, x = attention(rotary_base=50.0).train(), x_of().requires_grad_()
    wanted, _ = module(x, x, x, is_causal=True)
    cache = KeyValueCache()
    pieces = [module(p, p, p, is_causal=True, cache=cache)[0] for p in x.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted)
    inputs = (x, *module.parameters())
    loss = lambda out: out.square().sum()  # noqa: E731
    for mine, his in zip(
        torch.autograd.grad(loss(torch.cat(pieces, 1)), inputs),
        torch.autograd.grad(loss(wanted), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # and goes on without
        module(x[:, :1], x[:, :1], x[:, :1], is_causal=True, cache=cache)
    assert cache.length == 13


@pytest.mark.parametrize("max_len", [None, 40])
def test_gradients_after_positions_were_forgotten(max_len):
    """Those stay without a gradient, and others stand in their place."""
    k, v = torch.randn(2, 3, 2, 9, 8).unbind()
    k, v = k.requires_grad_(), v.requires_grad_()
    cache = KeyValueCache(max_len)
    cache.append(k[:, :, :6], v[:, :, :6])
    cache.truncate(4)
    cache.reorder(torch.tensor([2, 0, 0]))
    rest = k[:, :, 6:], v[:, :, 6:]
    found = cache.append(*rest)
    for mine, given, tail in zip(found, (k, v), rest, strict=True):
        wanted = torch.cat([given[[2, 0, 0], :, :4], tail], 2)
        assert torch.equal(mine, wanted)
        weights = torch.randn_like(wanted)
        grads = [torch.autograd.grad((x * weights).sum(), given)[0] for x in (mine, wanted)]
        assert torch.equal(*grads)
        assert not grads[0][:, :, 4:6].any()
    with torch.no_grad():  # and goes on without
        cache.truncate(5)
        last = torch.ones(3, 2, 1, 8)
        stored, _ = cache.append(last, last)
    assert torch.equal(stored, torch.cat([found[0][:, :, :5], last], 2))


@torch.no_grad()
def test_a_memory_is_projected_once():
    module, x, memory = attention(), x_of(), x_of(length=9, seed=1)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[1, 6:] = True
    wanted, _ = module(x, memory, memory, key_padding_mask=hidden)
    cache = MemoryCache()
    for start in range(0, 12, 4):
        piece = x[:, start : start + 4]
        out, _ = module(piece, memory, memory, key_padding_mask=hidden, cache=cache)
        torch.testing.assert_close(out, wanted[:, start : start + 4])
        memory = torch.full_like(memory, torch.nan)  # which is not looked at any more


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("page_size", [None, 4])
@torch.no_grad()
def test_stacks_step_by_step(norm_first, page_size):
    torch.manual_seed(0)
    make = {"batch_first": True, "norm_first": norm_first, "dropout": 0.0}
    encoder = fused_attn.FusedTransformerEncoder(
        fused_attn.FusedTransformerEncoderLayer(16, 4, 32, **make), 2, nn.LayerNorm(16), False
    ).eval()
    decoder = fused_attn.FusedTransformerDecoder(
        fused_attn.FusedTransformerDecoderLayer(16, 4, 32, **make), 2, nn.LayerNorm(16)
    ).eval()
    x, memory = x_of(), x_of(length=9, seed=1)
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[0, :3] = True
    memory_hidden = torch.zeros(2, 9, dtype=torch.bool)
    memory_hidden[1, 6:] = True
    for cut in (False, True):  # rows at padding are 0 on both ways, or torch.nn's
        for stack in (encoder, decoder):
            stack.pack_padding = not cut
        wanted = encoder(x, src_key_padding_mask=hidden, is_causal=True)
        crossed = decoder(
            x,
            memory,
            tgt_key_padding_mask=hidden,
            memory_key_padding_mask=memory_hidden,
            tgt_is_causal=True,
        )
        own, cross = encoder.new_cache(16, page_size), decoder.new_cache(16, page_size)
        start = 0
        for size in PIECES:
            end = start + size
            piece, seen = x[:, start:end], ~hidden[:, start:end]
            out = encoder(piece, src_key_padding_mask=hidden[:, :end], is_causal=True, cache=own)
            torch.testing.assert_close(out[seen], wanted[:, start:end][seen])
            out = decoder(
                piece,
                memory,
                tgt_key_padding_mask=hidden[:, :end],
                memory_key_padding_mask=memory_hidden,
                tgt_is_causal=True,
                cache=cross,
            )
            torch.testing.assert_close(out[seen], crossed[:, start:end][seen])
            start = end
        assert own[0].length == cross[1].length == 12


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_reordering_rows_and_forgetting_the_last(kind):
    module, x = attention(), x_of(3)
    cache = CACHES[kind]()
    rows = [x[i : i + 1] for i in range(3)]
    piece = x[:, :5]
    module(piece, piece, piece, is_causal=True, cache=cache)
    cache.reorder(torch.tensor([2, 0, 0, 1]))  # a row twice, one more than before
    rows = torch.cat([rows[i] for i in (2, 0, 0, 1)])
    for start, end in ((5, 6), (6, 9)):
        other = x_of(4, seed=start)[:, start:end]  # rows that were one go apart
        rows = torch.cat([rows[:, :start], other], 1)
        out, _ = module(other, other, other, is_causal=True, cache=cache)
        wanted, _ = module(rows, rows, rows, is_causal=True)
        torch.testing.assert_close(out, wanted[:, start:end])
    cache.truncate(6)
    piece = x_of(4, seed=77)[:, :2]
    rows = torch.cat([rows[:, :6], piece], 1)
    out, _ = module(piece, piece, piece, is_causal=True, cache=cache)
    wanted, _ = module(rows, rows, rows, is_causal=True)
    torch.testing.assert_close(out, wanted[:, 6:])


def test_pages_are_shared_and_taken_again():
    cache = PagedKeyValueCache(4)
    k = torch.randn(1, 2, 9, 8)
    cache.append(k, k)
    cache.reorder(torch.zeros(5, dtype=torch.int64))
    assert cache.pages_k.shape[0] < 8, "five rows, one copy"
    new = torch.randn(5, 2, 1, 8)
    stored, _ = cache.append(new, new)
    assert torch.equal(stored[:, :, :9], k.expand(5, -1, -1, -1))
    assert torch.equal(stored[:, :, 9:], new)
    pages = cache.pages_k.shape[0]
    for _ in range(50):
        cache.reorder(torch.zeros(5, dtype=torch.int64))
        cache.truncate(9)
        cache.append(new, new)
    assert cache.pages_k.shape[0] <= 2 * pages, "pages that nobody has are used again"


def test_memory_is_allocated_once():
    cache = KeyValueCache(32)
    k = torch.randn(1, 2, 1, 8)
    places = {cache.append(k, k)[0].data_ptr() for _ in range(32)}
    assert len(places) == 1


def layer():
    return fused_attn.FusedTransformerEncoderLayer(16, 4, 32, batch_first=True)


def stack():
    return fused_attn.FusedTransformerEncoder(layer(), 2)


def stock_inside():
    made = layer()
    made.self_attn = nn.MultiheadAttention(16, 4, batch_first=True)
    return made


def filled():
    cache = KeyValueCache(4)
    k = torch.randn(2, 4, 3, 4)
    cache.append(k, k)
    return cache


def filled_memory():
    cache = MemoryCache()
    cache.k = cache.v = torch.randn(2, 4, 3, 4)
    return cache


X = x_of(2, 2)
MISTAKES = {
    "a full cache": (lambda: attention()(X, X, X, cache=filled()), "holds max_len=4 positions"),
    "another batch": (
        lambda: attention()(X[:1], X[:1], X[:1], cache=filled()),
        r"`cache` holds .* \(2, 4, 4, torch.float32",
    ),
    "another dtype": (
        lambda: attention().double()(X.double(), X.double(), X.double(), cache=filled()),
        "torch.float64",
    ),
    "another memory": (
        lambda: attention()(X, X, X, cache=filled_memory()),
        "another memory needs a new MemoryCache",
    ),
    "a rotary memory": (
        lambda: attention(rotary_base=10.0)(X, X, X, cache=MemoryCache()),
        "positions of the queries",
    ),
    "no cache": (lambda: attention()(X, X, X, cache=3), "`cache` must be a KeyValueCache"),
    "a list for a layer": (lambda: layer()(X, cache=[KeyValueCache()]), "`cache` must be a"),
    "a cache for a stack": (lambda: stack()(X, cache=KeyValueCache()), "must be a list"),
    "too few": (lambda: stack()(X, cache=[KeyValueCache()]), "must be a list of 2, got 1"),
    "stock attention": (lambda: stock_inside()(X, cache=KeyValueCache()), "as `self_attn`"),
    "a decoder's": (
        lambda: fused_attn.FusedTransformerDecoderLayer(16, 4, 32)(X, X, cache=KeyValueCache()),
        "must be a LayerCache",
    ),
    "nested": (
        lambda: attention()(*[torch.nested.as_nested_tensor([X[0], X[1]])] * 3, cache=filled()),
        "no NestedTensors",
    ),
    "pages with gradients": (
        lambda: attention()(X, X, X, cache=PagedKeyValueCache(4)),
        "keeps no gradients",
    ),
    "a size of zero": (lambda: KeyValueCache(0), "`max_len` must be"),
    "a page of nothing": (lambda: PagedKeyValueCache(0), "`page_size` must be"),
    "too short to forget": (lambda: filled().truncate(9), r"`length` must be in \[0, 3\]"),
    "a mask of the new keys alone": (
        lambda: attention()(
            X, X, X, cache=KeyValueCache(), key_padding_mask=torch.zeros(2, 1, dtype=torch.bool)
        ),
        "key_padding_mask",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, words = MISTAKES[name]
    with pytest.raises((TypeError, ValueError, AssertionError), match=words):
        call()


def test_a_query_after_its_keys_is_warned_of():
    module, keys = attention(), x_of()
    with pytest.warns(UserWarning, match="cache="):
        module(keys[:, -1:], keys, keys, is_causal=True)


def test_a_layer_cache_is_reordered_whole():
    cache = LayerCache(KeyValueCache(), MemoryCache())
    k = torch.arange(2.0).view(2, 1, 1, 1)
    cache.own.append(k, k)
    cache.memory.k = cache.memory.v = k
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.own.k.flatten().tolist() == cache.memory.k.flatten().tolist() == [1, 1, 0]
