"""`flash_attn_with_kvcache`, rotary positions and padding against float64; everyday mistakes."""

import pytest
import torch

from fused_attn.integrations.flash_attn import bert_padding, interface, kvcache, rotary
from tests.cases.flash_attn import SEMANTICS, arguments, heads, oracle, own_slopes


def paged_copy(dense, page_size, seed=0):
    """The same keys in pages that lie in any order, and their table."""
    batch, room = dense.shape[:2]
    pages = room // page_size
    order = torch.randperm(batch * pages + 3, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * pages].view(batch, pages).int()
    store = heads(batch * pages + 3, page_size, *dense.shape[2:], seed=8)
    store[table.long()] = dense.unflatten(1, (pages, page_size))
    return store, table


@pytest.mark.parametrize("kind", ["dense", "paged", "rows", "left padding"])
@pytest.mark.parametrize("name", ["plain", "causal", "causal window", "softcap", "all"])
def test_appending_to_a_cache_and_attending_to_it(kind, name):
    options = dict(SEMANTICS[name])
    if "slopes" in options:
        options["slopes"] = heads(3, 4, seed=5).abs()
    batch, room = 3, 16
    dense_k, dense_v = heads(batch, room, 2, 8, seed=1), heads(batch, room, 2, 8, seed=2)
    for lengths, seqlen_q, new in (([5, 0, 9], 2, 2), ([7, 7, 7], 1, 1), ([3, 16, 8], 4, 0)):
        q = heads(batch, seqlen_q, 4, 8, seed=3)
        k, v = (heads(batch, new, 2, 8, seed=s) if new else None for s in (4, 5))
        cache_k, cache_v, extra = dense_k.clone(), dense_v.clone(), {}
        if kind == "paged":
            cache_k, table = paged_copy(dense_k, 4)
            cache_v, _ = paged_copy(dense_v, 4)
            extra["block_table"] = table
        if kind == "rows":
            rows = torch.tensor([4, 0, 2], dtype=torch.int32)
            cache_k, cache_v = heads(5, room, 2, 8, seed=6), heads(5, room, 2, 8, seed=7)
            cache_k[rows.long()], cache_v[rows.long()] = dense_k, dense_v
            extra["cache_batch_idx"] = rows
        first = [0, 0, 0]
        if kind == "left padding":
            first = [1, 0, 3]
            extra["cache_leftpad"] = torch.tensor(first, dtype=torch.int32)
        out, lse = kvcache.flash_attn_with_kvcache(
            q,
            cache_k,
            cache_v,
            k,
            v,
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
            return_softmax_lse=True,
            **arguments(options),
            **extra,
        )
        for b, length in enumerate(lengths):
            keys, values = (x[b].clone() for x in (dense_k, dense_v))
            if new:
                keys[length : length + new], values[length : length + new] = k[b], v[b]
            seen = slice(first[b], length + new)
            wanted, its_lse = oracle(
                q[b], keys[seen], values[seen], **options | own_slopes(options, b)
            )
            torch.testing.assert_close(out[b].double(), wanted, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(lse[b].double(), its_lse, rtol=1e-5, atol=2e-6)
            written = cache_k[b]
            if kind == "paged":
                written = cache_k[extra["block_table"][b].long()].flatten(0, 1)
            if kind == "rows":
                written = cache_k[extra["cache_batch_idx"][b]]
            assert torch.equal(written, keys), "new keys and nothing else"


def test_padding_that_covers_all_keys_leaves_nothing_to_see():
    q, k, v = heads(2, 3, 4, 8, seed=1), heads(2, 9, 2, 8, seed=2), heads(2, 9, 2, 8, seed=3)
    out, lse = kvcache.flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=torch.tensor([5, 6], dtype=torch.int32),
        cache_leftpad=torch.tensor([7, 2], dtype=torch.int32),
        return_softmax_lse=True,
    )
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((lse[0] == -torch.inf).all())
    wanted, its_lse = oracle(q[1], k[1, 2:6], v[1, 2:6])
    torch.testing.assert_close(out[1].double(), wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse[1].double(), its_lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_cache_with_rotary_positions(interleaved, causal):
    angles = torch.arange(20)[:, None] / 10 ** torch.arange(3)
    cos, sin = angles.cos(), angles.sin()  # six of eight numbers are turned
    q, k, v = heads(2, 2, 4, 8), heads(2, 2, 2, 8, seed=1), heads(2, 2, 2, 8, seed=2)
    cache_k, cache_v = heads(2, 12, 2, 8, seed=3), heads(2, 12, 2, 8, seed=4)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    before = cache_k.clone()
    out = kvcache.flash_attn_with_kvcache(
        q,
        cache_k,
        cache_v,
        k,
        v,
        cos,
        sin,
        cache_seqlens=lengths,
        causal=causal,
        rotary_interleaved=interleaved,
    )
    for b, length in enumerate(lengths.tolist()):
        turned = turn(k[b], [length, length + 1], angles, interleaved)
        torch.testing.assert_close(cache_k[b, length : length + 2].double(), turned)
        positions = [length, length + 1] if causal else [length, length]
        keys = torch.cat((before[b, :length].double(), turned))
        values = torch.cat((cache_v[b, :length], v[b]))
        wanted, _ = oracle(turn(q[b], positions, angles, interleaved), keys, values, causal=causal)
        torch.testing.assert_close(out[b].double(), wanted, rtol=1e-5, atol=2e-6)


def turn(x, positions, angles, interleaved):
    """As complex numbers: (x1 + i x2) e^(i angle)."""
    x = x.double()
    half = angles.shape[1]
    first, second = (
        (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (
            x[..., :half],
            x[..., half : 2 * half],
        )
    )
    turned = torch.complex(first, second) * torch.exp(1j * angles[positions].double())[:, None]
    pairs = (turned.real, turned.imag)
    joined = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((joined, x[..., 2 * half :]), -1)


def test_rotary_of_packed_rows_in_place_and_differentiable():
    angles = torch.arange(9)[:, None] / 3.0 ** torch.arange(4)
    cos, sin = angles.cos(), angles.sin()
    x = heads(7, 2, 8)
    cu = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    got = rotary.apply_rotary_emb(
        x, cos, sin, cu_seqlens=cu, seqlen_offsets=torch.tensor([1, 0, 5])
    )
    wanted = turn(x, [1, 2, 3, 5, 6, 7, 8], angles, False)
    torch.testing.assert_close(got.double(), wanted)
    dense = x.clone()[None]
    assert rotary.apply_rotary_emb(dense, cos, sin, interleaved=True, inplace=True) is dense
    torch.testing.assert_close(dense[0].double(), turn(x, range(7), angles, True))
    inputs = (heads(1, 3, 2, 8, grad=True).double(), cos.double(), sin.double())
    assert torch.autograd.gradcheck(rotary.apply_rotary_emb, inputs)
    with pytest.raises(ValueError, match="positions 3 to 9"):
        rotary.apply_rotary_emb(x[None], cos, sin, seqlen_offsets=3)


def test_padding_and_back():
    x = heads(3, 5, 2, 4, grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    rows, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert cu.tolist() == [0, 3, 3, 7]
    assert cu.dtype == used.dtype == torch.int32
    assert (longest, used.tolist()) == (4, [3, 0, 4])
    back = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None, None])
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(grad, mask[..., None, None].expand_as(x).float())


def cache_call(**changed):
    options = {
        "q": heads(2, 1, 4, 8),
        "k_cache": heads(2, 8, 2, 8),
        "v_cache": heads(2, 8, 2, 8),
        "k": heads(2, 1, 2, 8),
        "v": heads(2, 1, 2, 8),
        "cache_seqlens": torch.tensor([3, 4], dtype=torch.int32),
    }
    return lambda: kvcache.flash_attn_with_kvcache(**options | changed)


def pages(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


MISTAKES = {
    "a full cache": (cache_call(cache_seqlens=pages(8, 1)), "`cache_seqlens` must be in [0, 7]"),
    "a negative length": (cache_call(cache_seqlens=pages(-1, 1)), "`cache_seqlens` must be in"),
    "no length": (cache_call(cache_seqlens=None), "`cache_seqlens` must say"),
    "a float length": (cache_call(cache_seqlens=2.5), "`cache_seqlens` must be an int"),
    "k without v": (cache_call(v=None), "`k` and `v` must be given together"),
    "k of another size": (cache_call(k=heads(2, 1, 2, 4)), "`k` must have shape"),
    "a small cache": (cache_call(k_cache=heads(1, 8, 2, 8)), "`v_cache` must have shape"),
    "cos without k": (
        cache_call(k=None, v=None, rotary_cos=heads(9, 4), rotary_sin=heads(9, 4)),
        "`rotary_cos` needs the new keys",
    ),
    "cos without sin": (cache_call(rotary_cos=heads(9, 4)), "must be given together"),
    "a page out of range": (
        cache_call(block_table=pages(0, 9).view(2, 1)),
        "`block_table` must be in [0, 1]",
    ),
    "one page for two": (
        cache_call(block_table=pages(1, 1).view(2, 1), cache_seqlens=pages(3, 3)),
        "a place of its own",
    ),
    "a short table": (
        cache_call(block_table=pages(0, 1).view(2, 1), cache_seqlens=pages(9, 1)),
        "`cache_seqlens` must be in [0, 7]",
    ),
    "a cache in one place": (
        cache_call(k_cache=heads(1, 8, 2, 8).expand(2, 8, 2, 8)),
        "`k_cache` must have a place in memory for each element",
    ),
    "one memory for both": (
        (lambda one: cache_call(k_cache=one, v_cache=one))(heads(2, 8, 2, 8)),
        "`k_cache` and `v_cache` must not share memory",
    ),
    "new keys out of the cache": (
        (lambda one: cache_call(k_cache=one, k=one[:, 3:4]))(heads(2, 8, 2, 8)),
        "`k_cache`",
    ),
    "rows and pages": (
        cache_call(block_table=pages(0, 1).view(2, 1), cache_batch_idx=pages(0, 1)),
        "`cache_batch_idx` must be None",
    ),
    "a row out of range": (cache_call(cache_batch_idx=pages(0, 2)), "`cache_batch_idx` must be in"),
    "qkv with two": (
        lambda: interface.flash_attn_qkvpacked_func(heads(1, 4, 2, 2, 8)),
        "`qkv` must be (B, L, 3, H, D)",
    ),
    "a window of one": (
        lambda: interface.flash_attn_func(*[heads(1, 4, 2, 8)] * 3, window_size=(3,)),
        "`window_size` must be (left, right)",
    ),
    "heads that do not divide": (
        lambda: interface.flash_attn_func(heads(1, 4, 3, 8), *[heads(1, 4, 2, 8)] * 2),
        "got num_heads=3, num_heads_kv=2",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_argument_and_write_nothing(name):
    call, words = MISTAKES[name]
    cells = [cell.cell_contents for cell in call.__closure__ or ()]
    stores = [
        tensor
        for cell in cells
        if isinstance(cell, dict)
        for key, tensor in cell.items()
        if key.endswith("_cache")
    ]
    before = [store.clone() for store in stores]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert words in str(caught.value)
    assert "layout" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(stores, before, strict=True))


@pytest.mark.parametrize("padding", [-1, 1000])
def test_a_page_that_no_length_reaches_may_have_any_number(padding):
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(6, 4, 2, 16), torch.randn(6, 4, 2, 16)
    lengths = torch.tensor([11, 3], dtype=torch.int32)
    found, expected = (
        kvcache.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=lengths,
            block_table=torch.tensor([[3, 1, 2], [5, unused, unused]], dtype=torch.int32),
        )
        for unused in (padding, 0)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
