"""transformers' models by our attention: the same answers, and loud where it cannot be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import masking_utils

import fused_attn
from fused_attn.integrations import transformers as door
from fused_attn.integrations import transformers_check
from fused_attn.integrations import transformers_masks as masks
from tests.cases import transformers_models as zoo

pytestmark = [
    pytest.mark.usefixtures("one_thread", "registered"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def registered() -> Iterator[None]:
    door.register()
    yield
    door.unregister()


# The whole table is `python -m tests.cases.transformers_table`; these are one of each kind.
CORE = {
    "BERT": ("logits", "gradients"),
    "Llama": ("logits", "gradients", "greedy, left", "beam, right", "static cache", "compile"),
    "Mistral": ("logits", "gradients", "greedy, left", "static cache"),
    "Gemma 2": ("logits", "gradients"),
    "GPT-OSS": ("logits", "gradients", "greedy, right"),
    "T5": ("logits", "gradients", "greedy, left"),
    "Llama 4, chunks": ("logits", "gradients"),
    "ModernBERT": ("logits", "compile"),
    "ViT": ("logits", "gradients"),
    "Whisper": ("logits",),
    "DeepSeek-V3": ("logits", "gradients"),
}


@pytest.mark.parametrize("name", CORE)
def test_models_say_what_they_say_by_transformers_own(name: str) -> None:
    assert door.check(zoo.models(name)[0])
    for title in CORE[name]:
        difference = zoo.CHECKS[title][1](name)
        assert difference <= zoo.LIMIT, title
    zoo.models.cache_clear()


def sequence(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_by_position_ids(name: str) -> None:
    mine, theirs = zoo.models(name)
    x = torch.randint(3, zoo.VOCABULARY, (2, 12))
    positions = torch.cat([sequence(7, 5), sequence(2, 10)])
    found, expected = (m(x, position_ids=positions, use_cache=False).logits for m in (mine, theirs))
    assert zoo.difference(found, expected) <= zoo.LIMIT


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Llama 4, chunks"])
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_several_queries_after_a_cache(name: str, cache: str) -> None:
    """The last query stands at the last key, wherever the cache begins and ends."""
    x = torch.randint(3, zoo.VOCABULARY, (2, 12))
    results = []
    for model in zoo.models(name):
        settings = {"max_cache_len": 20} if cache == "StaticCache" else {}
        kept = getattr(transformers, cache)(config=model.config, **settings)
        with torch.no_grad():
            parts = [model(x[:, a:b], past_key_values=kept).logits for a, b in PARTS]
        results.append(torch.cat(parts, 1))
    assert zoo.difference(*results) <= zoo.LIMIT


PARTS = ((0, 5), (5, 9), (9, 10), (10, 12))


def test_masks_of_ones_own() -> None:
    mine, theirs = zoo.models("Llama")
    x = torch.randint(3, zoo.VOCABULARY, (2, 12))
    for mask in (torch.rand(2, 1, 12, 12) > 0.3, torch.randn(2, 1, 12, 12)):
        found, expected = (m(x, attention_mask=mask).logits for m in (mine, theirs))
        assert zoo.difference(found, expected) <= zoo.LIMIT
    with pytest.raises(TypeError, match=r"must be bool .* got torch.int64\nhint"):
        mine(x, attention_mask=torch.ones(2, 1, 12, 12).long())


@pytest.mark.parametrize("name", ["Mistral", "GPT-2"])  # which does not tell its layers
def test_attention_weights_come_when_asked_for(name: str) -> None:
    x = torch.randint(3, zoo.VOCABULARY, (2, 12))
    found = zoo.models(name)[0](x, output_attentions=True).attentions
    expected = zoo.make(name, "eager")(x, output_attentions=True).attentions
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    states = zoo.models(name)[0](x, output_hidden_states=True)
    assert len(states.hidden_states) == 3
    assert not states.attentions


def test_training_with_checkpointing_and_dropout() -> None:
    x = torch.randint(3, zoo.VOCABULARY, (2, 12))
    mine, theirs = (copy.deepcopy(model).train() for model in zoo.models("Llama"))
    mine.gradient_checkpointing_enable()
    for model in (mine, theirs):
        model(x, labels=x).loss.backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for layer in mine.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    first, second = mine(x).logits, mine(x).logits
    torch.manual_seed(0)
    assert torch.equal(mine(x).logits, first)
    assert not torch.allclose(first, second)


def test_sixteen_bits() -> None:
    """As near to float32 as transformers' own, within a factor."""
    x = zoo.inputs("Llama")
    mine, theirs = zoo.models("Llama")
    expected = zoo.logits(theirs, x).float()
    errors = []
    for model in (mine, theirs):
        half = copy.deepcopy(model).bfloat16()
        errors.append((zoo.logits(half, x).float() - expected).norm())
    assert errors[0] <= 1.5 * errors[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert zoo.logits(mine, x).isfinite().all()


def test_export_keeps_the_length_free() -> None:
    model = zoo.models("Llama")[0]
    x = torch.randint(3, zoo.VOCABULARY, (2, 6))
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    length = torch.export.Dim("length", min=2, max=30)
    given = {"input_ids": x, "attention_mask": mask, "use_cache": False}
    free = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), given, dynamic_shapes=free).module()
        longer = {
            "input_ids": torch.cat([x, x], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(x)], 1),
        }
        found, expected = exported(**longer, use_cache=False), model(**longer)
    real = longer["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real])


def test_continuous_batching_through_the_name_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = transformers.GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=zoo.PAD, eos_token_id=zoo.EOS
    )
    memory = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [3, 4]]
    model = zoo.make("Llama", "sdpa")

    def run() -> list[list[int]]:
        found = model.generate_batch(
            prompts,
            generation_config=settings,
            continuous_batching_config=memory,
            progress_bar=False,
        )
        return [list(found[key].generated_tokens) for key in sorted(found)]

    expected = run()
    calls = []
    plain = door.attention
    monkeypatch.setattr(door, "attention", lambda *a, **k: calls.append(1) or plain(*a, **k))
    door.register(replace_sdpa=True)
    assert run() == expected
    assert calls


# What a mask function of ours gives, by the number of elements that it holds in memory.
VECTORS: dict[str, Any] = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(3),
    "all": masking_utils.bidirectional_mask_function,
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "packed": masking_utils.packed_sequence_compatibility_function(
        masking_utils.causal_mask_function,
        torch.cat([sequence(7, 5), sequence(2, 10)]),
        torch.tensor([[0] * 7 + [1] * 5, [0] * 2 + [1] * 10]),
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", VECTORS)
def test_a_mask_is_a_vector_and_means_what_transformers_means(name: str, padded: bool) -> None:
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :3] = not padded
    given: dict[str, Any] = {
        "batch_size": 2, "q_length": 12, "kv_length": 12, "mask_function": VECTORS[name],
        "attention_mask": real, "allow_is_causal_skip": name != "packed",
        "allow_is_bidirectional_skip": name != "packed",
        "local_size": {"window": 3, "window both ways": 3, "chunks": 4}.get(name),
    }  # fmt: skip
    mask = masks.mask(**given)
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = masking_utils.sdpa_mask(**given)
    if mask is not None:
        assert mask.untyped_storage().nbytes() <= 2 * 12 * 4
    q, k, v = (torch.randn(2, 2, 12, 8) for _ in range(3))
    layer = torch.nn.Module()
    layer.is_causal = name == "causal"
    found, _ = door.attention_forward(layer, q, k, v, mask)
    expected = fused_attn.attention(q, k, v, mask=dense).transpose(1, 2)
    torch.testing.assert_close(found[real], expected[real])


def test_a_function_of_somebody_else_is_dense() -> None:
    def own(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (q + k) % 2 == 0

    both = masking_utils.and_masks(masking_utils.causal_mask_function, own)
    for function in (own, both):
        given = {"mask_function": function, "allow_is_causal_skip": False}
        mask = masks.mask(1, 6, 6, **given)
        assert torch.equal(mask, masking_utils.sdpa_mask(1, 6, 6, **given))
    assert masks.mask(1, 6, 6, allow_is_causal_skip=False).shape == (1, 1, 6, 6)


def test_a_model_that_changes_its_mask_is_told() -> None:
    padding = torch.tensor([[True] * 4 + [False] * 2])
    mask = masks.mask(1, 6, 6, attention_mask=padding)
    q = torch.randn(1, 2, 6, 8)
    for changed in (mask.bool(), mask.expand(-1, -1, 6, -1), mask[..., :4]):
        with pytest.raises(ValueError, match="mask"):
            door.attention_forward(torch.nn.Module(), q, q, q, changed)
    # Gemma 4 leaves out queries whose answers nobody wants.
    whole, _ = door.attention_forward(torch.nn.Module(), q, q, q, mask)
    last, _ = door.attention_forward(torch.nn.Module(), q[:, :, -2:], q, q, mask[:, :, -2:])
    torch.testing.assert_close(last, whole[:, -2:])


def test_a_layer_of_transformers_need_not_know_whether_it_is_causal() -> None:
    """Pegasus-X says that its decoder is not; only its mask knows."""
    mask = masks.mask(1, 6, 6)
    q = torch.randn(1, 2, 6, 8)
    layer = torch.nn.Module()
    layer.is_causal = False
    found, _ = door.attention_forward(layer, q, q, q, mask)
    torch.testing.assert_close(found, fused_attn.attention(q, q, q, causal=True).transpose(1, 2))


def test_sparse_attention_is_refused_and_runs_as_sdpa() -> None:
    settings = {
        **zoo.CASES["DeepSeek-V3"].settings, "index_n_heads": 2, "index_head_dim": 8,
        "index_topk": 4,
    }  # fmt: skip
    config = transformers.DeepseekV32Config(**settings)
    make = transformers.DeepseekV32ForCausalLM._from_config
    with pytest.raises(ValueError, match=r"chooses keys by an indexer.*\nhint: .*replace_sdpa"):
        make(copy.deepcopy(config), attn_implementation="fused_attn")
    model = make(copy.deepcopy(config), attn_implementation="sdpa").eval()
    x = torch.randint(3, zoo.VOCABULARY, (2, 9))
    expected = model(x).logits
    door.register(replace_sdpa=True)
    assert door.check(model)
    assert zoo.difference(model(x).logits, expected) <= zoo.LIMIT
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"`indices=`"):
        door.attention_forward(torch.nn.Module(), q, q, q, None, indices=torch.zeros(1))


IGNORING = {
    "Bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 1, "n_heads": 2}),
    "Falcon": (
        "FalconConfig", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ),
    "GPT-J": ("GPTJConfig", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4}),
    "DeBERTa-v2": ("DebertaV2Config", {"hidden_size": 32, "num_hidden_layers": 1,
                                       "num_attention_heads": 2, "intermediate_size": 32}),
    "MPNet": ("MPNetConfig", {"hidden_size": 32, "num_hidden_layers": 1,
                              "num_attention_heads": 2, "intermediate_size": 32}),
}  # fmt: skip


def test_models_with_layers_that_never_ask_name_them() -> None:
    """Some layers ask, some do not: a warning before the first forward, `check` the same."""
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    for kind in ("local", "transient-global"):
        config = transformers.LongT5Config(
            vocab_size=zoo.VOCABULARY, encoder_attention_type=kind, local_radius=2, **small
        )
        with pytest.warns(UserWarning, match="not reach LongT5LocalAttention, LongT5Tr"):
            model = transformers.LongT5Model._from_config(config, attn_implementation="fused_attn")
        theirs = [layer.kind for layer in door.check(model).layers if not layer.ours]
        assert theirs
        assert set(theirs) <= {"LongT5LocalAttention", "LongT5TransientGlobalAttention"}
    plain = transformers.T5Config(vocab_size=zoo.VOCABULARY, **small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.T5Model._from_config(plain, attn_implementation="fused_attn")
        assert not transformers_check.keep_theirs(transformers.Gemma3nTextModel)
    assert transformers_check.keep_theirs(transformers.PegasusXModel)


@pytest.mark.parametrize("name", IGNORING)
def test_models_that_would_ignore_it_say_so_before_the_first_forward(name: str) -> None:
    config, settings = IGNORING[name]
    config = getattr(transformers, config)(vocab_size=64, **settings)
    model = transformers.AutoModel.from_config(copy.deepcopy(config))
    report = door.check(model)
    assert not report
    assert [layer.runs for layer in report.layers] == ["its own code"]
    assert "ignores `attn_implementation`" in str(report)
    said = r"cannot run attn_implementation='fused_attn'.*\nhint: "
    with pytest.raises(ValueError, match=said):
        transformers.AutoModel.from_config(config, attn_implementation="fused_attn")
    with pytest.raises(ValueError, match=said):
        model.set_attn_implementation("fused_attn")


def test_check_tells_what_runs() -> None:
    model = zoo.make("Llama")
    report = door.check(model)
    first = report.layers[0]
    assert (first.name, first.runs, first.ours) == ("model.layers.0.self_attn", "'sdpa'", False)
    assert "0 of 2 attention layers run fused_attn" in str(report)
    assert 'set_attn_implementation("fused_attn")' in report.warnings[0]
    model.set_attn_implementation("fused_attn")
    assert door.check(model)
    both = torch.nn.ModuleList([model, torch.nn.MultiheadAttention(8, 2)])
    assert "`fused_attn.fuse(model)`" in door.check(both).warnings[0]
    fused_attn.fuse(both)
    assert door.check(both)
    assert "no attention layer found" in str(door.check(torch.nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got str"):
        door.check("llama")


@pytest.mark.parametrize("name", ["", "sdpa", "my_flash", "paged|fused", "org/fused", 3])
def test_names_that_mean_something_to_transformers_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="`name`"):
        door.register(name)


def test_registering_is_taken_back() -> None:
    from transformers.modeling_utils import AttentionInterface as Functions

    door.unregister()
    before = dict(Functions._global_mapping)
    methods = dict(vars(transformers.PreTrainedModel))
    door.register("ours", replace_sdpa=True)
    door.register("ours")
    assert Functions._global_mapping["sdpa"] is door.attention_forward
    Functions.register("theirs", print)
    with pytest.raises(ValueError, match="'theirs' is taken"):
        door.register("theirs")
    Functions._global_mapping.pop("theirs")
    door.unregister()
    door.unregister()
    assert dict(Functions._global_mapping) == before
    assert dict(vars(transformers.PreTrainedModel)) == methods
    assert not door.check(zoo.make("Llama"))


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    door.unregister()
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda cache_position: None)
    with pytest.raises(ImportError, match="needs transformers 5 or later, got"):
        door.register()
