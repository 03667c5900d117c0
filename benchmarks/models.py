"""Whole models before and after `fuse(model, linears=True)`, beside stock, in one process.

    python -m benchmarks.models [--only TEXT] [--save]

Random models with the widths, heads and numbers of layers of BERT-base and GPT-2 (of torch.nn's
layers) and the widths of a Llama of 1.1 billion parameters (of `transformers`, two layers of its
22). Inference and a training step, float32 and bfloat16, one thread of CPU time, by turns; the
table says how far the outputs are apart.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.suites.machine import RESULTS, folder_name
from benchmarks.suites.results import save_rows
from fused_attn import fuse

ROUNDS = 3
SLOW = 5.0  # seconds; a call that takes longer counts at once
TOKENS = 128


def _layers(norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        768, 12, 3072, 0.0, nn.GELU(approximate="tanh" if norm_first else "none"),
        batch_first=True, norm_first=norm_first,
    )  # fmt: skip
    norm = nn.LayerNorm(768) if norm_first else None
    return nn.TransformerEncoder(layer, 12, norm, enable_nested_tensor=False)


class Decoder(nn.Module):
    """Layers that look back only, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _layers(norm_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x, mask=self.mask.to(x.dtype), is_causal=True)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=2, vocab_size=1000, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return LlamaModel(config)


class Llama(nn.Module):
    """Its layers, on embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _llama()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "BERT-base": (lambda: _layers(norm_first=False), 768),
    "GPT-2": (Decoder, 768),
    "Llama 1.1B, 2 layers": (Llama, 2048),
}


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def by_turns(runs: list[Callable[[], object]]) -> list[float]:
    """Seconds of each: the median of some rounds, or of one call where that is slow."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            if turn > 0 and found and found[0] > SLOW:
                continue
            found.append(_seconds(run))
    return [statistics.median(found[1:] or found) for found in times]


def rows(only: str) -> Iterator[dict[str, object]]:
    for name, (make, width) in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            label = f"{name} {str(dtype)[6:]}"
            if only not in label:
                continue
            stock = make().to(dtype)
            ours = copy.deepcopy(stock)
            fuse(ours, linears=True)
            x = torch.randn(2, TOKENS, width).to(dtype)
            for training in (False, True):
                yield _row(f"{label} {'training' if training else 'inference'}", stock, ours, x)


def _row(label: str, stock: nn.Module, ours: nn.Module, x: Tensor) -> dict[str, object]:
    training = label.endswith("training")
    outputs = []
    for model in (stock, ours):
        model.train(training)
        with torch.no_grad():
            outputs.append(model(x).double())

    def step(model: nn.Module) -> None:
        if training:
            model(x).float().square().mean().backward()
            model.zero_grad(set_to_none=True)
            return
        with torch.no_grad():
            model(x)

    mine, theirs = by_turns([lambda: step(ours), lambda: step(stock)])
    apart = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    return {
        "model": label,
        "tokens": x.shape[0] * x.shape[1],
        "ours_ms": round(mine * 1e3, 1),
        "stock_ms": round(theirs * 1e3, 1),
        "ratio": round(theirs / mine, 2),
        "outputs_apart": f"{apart:.1e}",
    }


def tell(row: dict[str, object], file: str | None) -> None:
    """Print a row and, where there is a file, record it there."""
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if file is not None:
        save_rows(RESULTS / folder_name() / file, [row], "model")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for row in rows(options.only):
        tell(row, "models.csv" if options.save else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
