"""The functions that code imports from `flash_attn`, against float64, and their modules."""

import importlib
import sys

import pytest
import torch

from fused_attn.integrations import flash_attn as door
from fused_attn.integrations.flash_attn import interface
from tests.cases.flash_attn import SEMANTICS, arguments, heads, oracle, own_slopes

LENGTHS = [(7, 7), (3, 9), (9, 3), (1, 12), (5, 0)]


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
            oracle(q[b], kv[b, :, 0], kv[b, :, 1], **options | own_slopes(options, b))
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
