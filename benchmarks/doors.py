"""Models of transformers through the door: eager, sdpa and ours, by turns, in one process.

    python -m benchmarks.doors [--only TEXT] [--save]

Random models with the widths and heads of BERT-base, GPT-2, a Llama of 1.1 billion parameters,
ViT-base and T5-base, four layers of each (two of Llama). "ours" is
`attn_implementation="fused_attn"` and nothing else; "fused" is that and `fuse(model,
linears=True)`. Inference, a training step and greedy generation, float32 and bfloat16, one thread
of CPU time; the table says how far the outputs are from those of sdpa.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks.models import by_turns, tell
from fused_attn import fuse
from fused_attn.integrations.transformers import register

OURS = "fused_attn"
BATCH, LENGTH, NEW = 2, 128, 16  # NEW: tokens that are generated
WORDS = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(NamedTuple):
    """Names of its classes in transformers, its settings, and what it can do."""

    config: str
    model: str
    settings: dict[str, Any]
    inputs: str = "input_ids"
    generates: bool = False


MODELS: dict[str, Model] = {
    "BERT": Model(
        "BertConfig", "BertForMaskedLM",
        {"vocab_size": WORDS, "num_hidden_layers": 4, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0},
    ),
    "GPT-2": Model(
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_layer": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0},
        generates=True,
    ),
    "Llama": Model(
        "LlamaConfig", "LlamaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 2048, "intermediate_size": 5632,
         "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 2},
        generates=True,
    ),
    "ViT": Model(
        "ViTConfig", "ViTForImageClassification",
        {"num_hidden_layers": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        inputs="pixel_values",
    ),
    "T5": Model(
        "T5Config", "T5ForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 4,
         "num_heads": 12, "dropout_rate": 0.0, "decoder_start_token_id": 0},
        generates=True,
    ),
}  # fmt: skip


def sides(which: Model, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same weights with each attention."""
    register()
    config = getattr(transformers, which.config)(
        **which.settings, pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    torch.manual_seed(0)
    first = getattr(transformers, which.model)(config).to(dtype)
    found: dict[str, nn.Module] = {}
    for name in ("eager", "sdpa", OURS):
        found[name] = copy.deepcopy(first)
        found[name].set_attn_implementation(name)
    found["fused"] = copy.deepcopy(found[OURS])
    fuse(found["fused"], linears=True)
    return found


def inputs(which: Model, model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if which.inputs == "pixel_values":
        size = model.config.image_size
        pixels = torch.randn(BATCH, 3, size, size).to(next(model.parameters()).dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    tokens = torch.randint(3, WORDS, (BATCH, LENGTH))
    return {"input_ids": tokens, "labels": tokens}


def infer(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def train(model: nn.Module, given: dict[str, Tensor]) -> None:
    model(**given).loss.backward()
    model.zero_grad(set_to_none=True)


def generate(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model.generate(
        given["input_ids"], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )


WORK: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "inference": infer,
    "training": train,
    "generate": generate,
}


def row(name: str, dtype: str, work: str, models: dict[str, nn.Module]) -> dict[str, object]:
    """The times of each side, and sdpa's over ours."""
    given = inputs(MODELS[name], models["sdpa"])
    for model in models.values():
        model.train(work == "training")
    runs = [functools.partial(WORK[work], model, given) for model in models.values()]
    times = dict(zip(models, by_turns(runs), strict=True))
    true = infer(models["sdpa"], given).double()
    apart = (infer(models["fused"], given).double() - true).norm() / true.norm()
    return {
        "model": f"{name} {dtype} {work}",
        **{f"{side}_ms": round(seconds * 1e3, 1) for side, seconds in times.items()},
        "door_ratio": round(times["sdpa"] / times[OURS], 2),
        "fused_ratio": round(times["sdpa"] / times["fused"], 2),
        "outputs_apart": f"{apart:.1e}",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, which in MODELS.items():
        for dtype in DTYPES:
            wanted = [work for work in WORK if options.only in f"{name} {dtype} {work}"]
            wanted = [work for work in wanted if work != "generate" or which.generates]
            models = sides(which, DTYPES[dtype]) if wanted else {}
            for work in wanted:
                tell(row(name, dtype, work, models), "doors.csv" if options.save else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
