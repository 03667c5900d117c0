"""The functions that code imports from `flash_attn`, against float64."""

import importlib
import math
import sys

import pytest
import torch

from fused_attn.integrations import flash_attn as door
from fused_attn.integrations.flash_attn import bert_padding, interface, kvcache, rotary


def heads(*shape, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def oracle(q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, scale=None, slopes=None):
    """flash_attn's own definition for one sequence, (L, H, D), in float64: out and lse."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    d = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * d.abs()
    left, right = window
    right = 0 if causal and (right < 0 or right > 0) else right
    hidden = torch.zeros_like(d, dtype=torch.bool)
    if left >= 0:
        hidden |= d > left
    if right >= 0:
        hidden |= d < -right
    s = s.masked_fill(hidden, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(s, -1))
    return torch.einsum("hij,jhd->ihd", weights, v), torch.logsumexp(s, -1)


SEMANTICS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "causal window": {"causal": True, "window": (2, -1)},
    "a window to the right only": {"window": (-1, 2)},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3, "causal": True},
    "alibi": {"slopes": True, "causal": True},
    "all": {"slopes": True, "causal": True, "window": (4, 0), "softcap": 2.0, "scale": 0.5},
}
LENGTHS = [(7, 7), (3, 9), (9, 3), (1, 12), (5, 0)]


def arguments(options):
    names = {"causal": "causal", "window": "window_size", "softcap": "softcap"}
    names |= {"scale": "softmax_scale", "slopes": "alibi_slopes"}
    return {names[name]: value for name, value in options.items()}


@pytest.mark.parametrize("name", SEMANTICS)
def test_dense_calls_and_their_gradients(name):
    for number, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        options = dict(SEMANTICS[name])
        if "slopes" in options:
            options["slopes"] = heads(2, 4, seed=5).abs()  # one for each batch element and head
        q = heads(2, seqlen_q, 4, 8, seed=number, grad=True)
        kv = heads(2, seqlen_k, 2, 2, 8, seed=number + 50, grad=True)
        dout = heads(2, seqlen_q, 4, 8, seed=9)
        out, lse, nothing = interface.flash_attn_kvpacked_func(
            q, kv, return_attn_probs=True, **arguments(options)
        )
        assert nothing is None
        grads = torch.autograd.grad(out, (q, kv), dout)
        each = [
            oracle(q[b], kv[b, :, 0], kv[b, :, 1], **options | _own_slopes(options, b))
            for b in range(2)
        ]
        wanted = torch.stack([out for out, _ in each])
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(
            lse.double(), torch.stack([lse for _, lse in each]), rtol=1e-5, atol=2e-6
        )
        if seqlen_k:
            theirs = torch.autograd.grad(wanted, (q, kv), dout.double())
            torch.testing.assert_close(grads, theirs, rtol=2e-5, atol=1e-5)


def _own_slopes(options, b):
    return {"slopes": options["slopes"][b]} if "slopes" in options else {}


@pytest.mark.parametrize("name", SEMANTICS)
def test_packed_sequences_some_of_them_empty(name):
    lengths_q, lengths_k = [4, 0, 7, 3, 0], [6, 5, 7, 0, 0]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    for per_sequence in (False, True):
        options = dict(SEMANTICS[name])
        if "slopes" in options:
            options["slopes"] = heads(5, 4, seed=5).abs() if per_sequence else heads(4).abs()
        elif per_sequence:
            continue
        q, k, v = (heads(n, h, 8, seed=n, grad=True) for n, h in ((15, 4), (18, 2), (18, 2)))
        out, lse, _ = interface.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 7, torch.tensor(7), return_attn_probs=True, **arguments(options)
        )
        assert out.shape == (15, 4, 8)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        wanted = []
        for n in range(5):
            rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
            own = {"slopes": options["slopes"][n]} if per_sequence else {}
            mine, its_lse = oracle(q[rows], k[keys], v[keys], **options | own)
            wanted.append(mine)
            torch.testing.assert_close(out[rows].double(), mine, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(lse[:, rows].double(), its_lse, rtol=1e-5, atol=2e-6)
        theirs = torch.autograd.grad(torch.cat(wanted).sum(), (q, k, v))
        torch.testing.assert_close(grads, theirs, rtol=2e-5, atol=1e-5)


def test_packed_tensors_are_read_in_place():
    qkv = heads(2, 6, 3, 4, 8, grad=True)
    out = interface.flash_attn_qkvpacked_func(qkv, causal=True)
    wanted = interface.flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(out, wanted)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    rows = qkv.flatten(0, 1)
    packed = interface.flash_attn_varlen_qkvpacked_func(rows, cu, 6, causal=True)
    torch.testing.assert_close(packed, out.flatten(0, 1))
    kv = interface.flash_attn_varlen_kvpacked_func(
        rows[:, 0], rows[:, 1:], cu, cu, 6, 6, causal=True
    )
    assert torch.equal(kv, packed)


def test_dropout_and_the_probabilities_that_encode_it():
    q, k = heads(1, 40, 2, 8), heads(1, 50, 2, 8, seed=1)
    v = torch.eye(50)[None, :, None].expand(1, 50, 2, 50)
    torch.manual_seed(3)
    out, _, weights = interface.flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)
    exact, _ = oracle(q[0], k[0], v[0])
    torch.testing.assert_close(
        weights.abs()[0].transpose(0, 1).double(), exact, rtol=1e-4, atol=1e-6
    )
    kept = weights > 0
    assert 0.6 < kept.float().mean() < 0.8
    torch.testing.assert_close(
        out[0].transpose(0, 1), torch.where(kept, weights, 0.0)[0] / 0.7, rtol=1e-4, atol=1e-6
    )
    torch.manual_seed(3)
    again = interface.flash_attn_func(q, k, v, dropout_p=0.3)
    assert torch.equal(out, again)


# --- the cache ---------------------------------------------------------------------------------


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
                q[b], keys[seen], values[seen], **options | _own_slopes(options, b)
            )
            torch.testing.assert_close(out[b].double(), wanted, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(lse[b].double(), its_lse, rtol=1e-5, atol=2e-6)
            written = cache_k[b]
            if kind == "paged":
                written = cache_k[extra["block_table"][b].long()].flatten(0, 1)
            if kind == "rows":
                written = cache_k[extra["cache_batch_idx"][b]]
            assert torch.equal(written, keys), "new keys and nothing else"


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


# --- the modules -------------------------------------------------------------------------------


@pytest.fixture
def installed():
    door.install()
    yield
    door.uninstall()


def test_the_names_that_code_imports(installed):
    import flash_attn
    from flash_attn import flash_attn_func, flash_attn_with_kvcache  # noqa: F401
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401
    from flash_attn.flash_attn_interface import (
        flash_attn_kvpacked_func,  # noqa: F401
        flash_attn_qkvpacked_func,  # noqa: F401
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,  # noqa: F401
        flash_attn_varlen_qkvpacked_func,  # noqa: F401
    )
    from flash_attn.layers.rotary import apply_rotary_emb  # noqa: F401

    assert flash_attn.flash_attn_varlen_func is flash_attn_varlen_func
    assert importlib.util.find_spec("flash_attn") is not None
    assert tuple(int(x) for x in flash_attn.__version__.split(".")) >= (2, 3, 3)
    with pytest.raises(ImportError):
        from flash_attn.flash_attn_interface import _flash_attn_forward  # noqa: F401
    with pytest.raises(AttributeError, match="has no 'flash_blocksparse'"):
        _ = flash_attn.flash_blocksparse


def test_nothing_is_left_behind():
    finders = list(sys.meta_path)
    door.install()
    door.install()
    door.uninstall()
    door.uninstall()
    assert not any(name.partition(".")[0] == "flash_attn" for name in sys.modules)
    assert sys.meta_path == finders
    assert not door.is_installed()


def test_a_real_flash_attn_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("flash_attn_func = 'the real one'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="force=True"):
        door.install()
    import flash_attn

    assert flash_attn.flash_attn_func == "the real one"
    door.install(force=True)
    from flash_attn import flash_attn_func

    assert flash_attn_func is interface.flash_attn_func
    door.uninstall()
    assert sys.modules.pop("flash_attn").flash_attn_func == "the real one"


def test_transformers_flash_attention_2_on_a_cpu():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    eager = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    door.install()
    try:
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="flash_attention_2"
        ).eval()
        model.load_state_dict(eager.state_dict())
        for given in (torch.ones_like(mask), mask):
            got = model(tokens, attention_mask=given).logits[given.bool()]
            wanted = eager(tokens, attention_mask=given).logits[given.bool()]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            options = {"attention_mask": given, "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(model.generate(tokens, **options), eager.generate(tokens, **options))
    finally:
        door.uninstall()
    with pytest.raises(ImportError, match="FlashAttention2"):
        transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="flash_attention_2"
        )


# --- mistakes ----------------------------------------------------------------------------------


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
