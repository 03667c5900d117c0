"""Tiny transformers models with random weights, and what is compared between their attentions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_attn

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 64, 32, 4, 9, 3
PAD, BOS, EOS = 0, 1, 2
LIMIT = 2e-5  # of differences, in parts of the largest value: float32 through two layers and a head
OURS = "fused_attn"

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_VISION = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "image_size": 16, "patch_size": 4,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    **_LLAMA, **_MOE, "head_dim": 4, "num_key_value_heads": HEADS, "n_routed_experts": 4,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 6, "first_k_dense_replace": 1,
}  # fmt: skip
_MIMO = {
    **_LLAMA, **_MOE, "head_dim": 12, "v_head_dim": 8, "n_routed_experts": 4, "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip


class Case(NamedTuple):
    """A model: names of its classes in transformers, and the settings of its configuration."""

    config: str
    model: str
    settings: dict[str, Any]
    kind: str = "decoder"  # or encoder, encoder-decoder, vision, speech, image and text
    theirs: str = "sdpa"  # the attention of transformers that ours is held against


CASES: dict[str, Case] = {
    "BERT": Case("BertConfig", "BertForMaskedLM", _BERT, "encoder"),
    "RoBERTa": Case("RobertaConfig", "RobertaForMaskedLM", _BERT, "encoder"),
    "GPT-2": Case(
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS,
         "n_positions": 64, **_IDS},
    ),
    "Llama": Case("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "Llama, one key head": Case(
        "LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 1}
    ),
    "Mistral": Case("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 5}),
    "Gemma 2": Case(
        "Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, "sliding_window": 5}, theirs="eager"
    ),
    "T5": Case(
        "T5Config", "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2,
         "num_heads": HEADS, "decoder_start_token_id": PAD, **_IDS}, "encoder-decoder",
    ),
    "BART": Case(
        "BartConfig", "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": EOS,
         "forced_eos_token_id": None, **_IDS}, "encoder-decoder",
    ),
    "ViT": Case("ViTConfig", "ViTForImageClassification", _VISION, "vision"),
    "Whisper": Case(
        "WhisperConfig", "WhisperForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_source_positions": 16, "max_target_positions": 64,
         "num_mel_bins": 8, "decoder_start_token_id": BOS, "suppress_tokens": None,
         "begin_suppress_tokens": None, **_IDS}, "speech",
    ),
    "CLIP": Case(
        "CLIPConfig", "CLIPModel",
        {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 16}, "image and text",
    ),
    "GPT-OSS": Case(
        "GptOssConfig", "GptOssForCausalLM",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        theirs="eager",
    ),
    "MiMo-V2-Flash": Case("MiMoV2FlashConfig", "MiMoV2FlashForCausalLM", _MIMO, theirs="eager"),
    "Gemma 3": Case("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, "sliding_window": 5}),
    "Qwen 2": Case("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "Qwen 3": Case("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "DeepSeek-V3": Case("DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK),
    "ModernBERT": Case(
        "ModernBertConfig", "ModernBertForMaskedLM",
        {**_BERT, "local_attention": 4, "cls_token_id": BOS, "sep_token_id": EOS}, "encoder",
    ),
    "Llama 4, chunks": Case(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {**_LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4},
    ),
    "Phi-3": Case(
        "Phi3Config", "Phi3ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}
    ),
    "GPT-NeoX": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", _BERT),
    "OPT": Case(
        "OPTConfig", "OPTForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": HEADS, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64,
         **_IDS},
    ),
    "DistilBERT": Case(
        "DistilBertConfig", "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": HEADS,
         "max_position_embeddings": 64, **_IDS}, "encoder",
    ),
    "XLM-R": Case("XLMRobertaConfig", "XLMRobertaForMaskedLM", _BERT, "encoder"),
    "ELECTRA": Case("ElectraConfig", "ElectraForMaskedLM", _BERT, "encoder"),
}  # fmt: skip


def make(name: str, implementation: str | None = None) -> nn.Module:
    """The model in eval mode; the same weights each time."""
    import transformers

    case = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**case.settings)
    config._attn_implementation = implementation or case.theirs
    model = getattr(transformers, case.model)(config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # the usual 0.02 would leave attention nothing to decide
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def padding(side: str) -> Tensor:
    """(B, L), 1 = real: the first sequence is whole."""
    lengths = torch.tensor([LENGTH, 6, 4])[:, None]
    position = torch.arange(LENGTH)
    real = position < lengths if side == "right" else position >= LENGTH - lengths
    return real.long()


def inputs(name: str, side: str = "right") -> dict[str, Tensor]:
    """Of a training step, without labels."""
    kind = CASES[name].kind
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = padding(side)
    text = {"input_ids": torch.where(mask == 1, tokens, PAD), "attention_mask": mask}
    answer = {"decoder_input_ids": tokens[:, :5]}
    if kind == "vision":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)}
    if kind == "speech":
        return {"input_features": torch.randn(BATCH, 8, 32, generator=generator), **answer}
    if kind == "image and text":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator), **text}
    return {**text, **answer} if kind == "encoder-decoder" else text


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """What the model says of all that is real: padding's rows are nobody's."""
    output = model(**given)
    found = output.logits if "logits" in output else output.logits_per_image
    mask = given.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.shape[:2] == mask.shape else found


def logits_and_gradients(name: str, model: nn.Module, side: str) -> tuple[Tensor, list[Tensor]]:
    found = logits(model, inputs(name, side))
    model.zero_grad()
    found.float().sin().sum().backward()
    return found.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference, in parts of the largest value."""
    mine, theirs = mine.detach(), theirs.detach()
    scale = theirs.float().abs().max().clamp(min=1e-6)
    return float((mine.float() - theirs.float()).abs().max() / scale)


def tokens(name: str, model: nn.Module, side: str, **settings: Any) -> Tensor:
    """What the model generates."""
    given = inputs(name, side)
    given.pop("decoder_input_ids", None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                              **settings)  # fmt: skip


CHECKS: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {}
GENERATING = ("decoder", "encoder-decoder", "speech")
PADDED = ("decoder", "encoder-decoder", "encoder", "image and text")


def _check(title: str, *kinds: str) -> Callable[..., Any]:
    def add(function: Callable[..., float]) -> Callable[..., float]:
        CHECKS[title] = (kinds, function)
        return function

    return add


@functools.cache
def models(name: str) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs), with equal weights."""
    return make(name, OURS), make(name)


@_check("logits", "encoder", "decoder", "encoder-decoder", "speech", "vision", "image and text")
def _logits(name: str) -> float:
    return max(_both(name, side)[0] for side in _sides(name))


@_check("gradients", "encoder", "decoder", "encoder-decoder", "speech", "vision", "image and text")
def _gradients(name: str) -> float:
    return max(_both(name, side)[1] for side in _sides(name))


@_check("greedy, right", "encoder-decoder", "decoder", "speech")
def _greedy_right(name: str) -> float:
    return _same_tokens(name, "right")


@_check("greedy, left", "decoder", "encoder-decoder")
def _greedy_left(name: str) -> float:
    return _same_tokens(name, "left")


@_check("beam, right", *GENERATING)
def _beam_right(name: str) -> float:
    return _same_tokens(name, "right", num_beams=2)


@_check("beam, left", "decoder", "encoder-decoder")
def _beam_left(name: str) -> float:
    return _same_tokens(name, "left", num_beams=2)


@_check("static cache", "decoder")
def _static(name: str) -> float:
    return _same_tokens(name, "left", cache_implementation="static", disable_compile=True)


@_check("fuse", "encoder", "decoder", "encoder-decoder", "speech", "vision", "image and text")
def _fuse(name: str) -> float:
    """Logits and gradients with our norms and feed-forwards as well."""
    mine, _ = models(name)
    fused_attn.fuse(mine)
    found = max(_both(name, "right"))
    fused_attn.unfuse(mine)
    return found


@_check("compile", "encoder", "decoder", "encoder-decoder", "speech", "vision", "image and text")
def _compile(name: str) -> float:
    """fullgraph, by AOTAutograd: what Inductor would be given; the answer is eager's of ours."""
    torch._dynamo.reset()
    mine = models(name)[0]
    given = inputs(name)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return difference(logits(compiled, given), logits(mine, given))


def _sides(name: str) -> tuple[str, ...]:
    return ("right", "left") if CASES[name].kind in PADDED else ("right",)


def _both(name: str, side: str) -> tuple[float, float]:
    mine, theirs = models(name)
    out, gradients = logits_and_gradients(name, mine, side)
    expected, expected_gradients = logits_and_gradients(name, theirs, side)
    assert len(gradients) == len(expected_gradients)
    largest = max(float(g.abs().max()) for g in expected_gradients)
    worst = max(
        float((a - b).abs().max()) for a, b in zip(gradients, expected_gradients, strict=True)
    )
    return difference(out, expected), worst / largest


def _same_tokens(name: str, side: str, **settings: Any) -> float:
    mine, theirs = models(name)
    a, b = (tokens(name, model, side, **settings) for model in (mine, theirs))
    return 0.0 if torch.equal(a, b) else 1.0
