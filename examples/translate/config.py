"""What defines a run, from the command line to the checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from recurrent import RecurrentSeq2Seq
from torch import nn
from vocabulary import PAD

from fused_attn import Seq2SeqTransformer

MODELS = ("transformer", "gru", "gru-attention")


@dataclass(frozen=True)
class Config:
    """Everything that a run's numbers depend on; a resumed run must have the same."""

    source: str = "en"
    target: str = "de"
    model: str = "transformer"
    backend: str = "fused"
    vocab_size: int = 8000
    width: int = 256
    heads: int = 4
    layers: int = 4
    feed_forward: int = 1024
    dropout: float = 0.2
    post_norm: bool = False
    positions: str = "sinusoidal"
    max_tokens: int = 128
    batch_tokens: int = 2048
    warmup: int = 1000
    peak_rate: float = 1e-3
    label_smoothing: float = 0.1
    clip: float = 1.0
    precision: str = "fp32"
    seed: int = 0

    def build(self, vocab: int) -> nn.Module:
        """The model, for a vocabulary of so many tokens."""
        if self.model == "transformer":
            return Seq2SeqTransformer(
                vocab,
                None,
                self.width,
                self.heads,
                self.layers,
                self.layers,
                self.feed_forward,
                self.dropout,
                norm_first=not self.post_norm,
                padding_idx=PAD,
                max_len=self.max_tokens,
                positions=self.positions,
                backend=self.backend,
            )
        attention = self.model == "gru-attention"
        # Two recurrent layers: more are slower and, at this size of corpus, no better.
        return RecurrentSeq2Seq(
            vocab, 2 * self.width, 2, self.dropout, attention, PAD, self.max_tokens
        )

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: linear to the peak, then as step^-½.

        Vaswani et al. 2017, equation 3; d_model^-½ there sets the peak that is given here.
        """
        return self.peak_rate * min(step / self.warmup, (self.warmup / step) ** 0.5)


_CHOICES = {
    "model": MODELS,
    "backend": ("fused", "torch"),
    "positions": ("sinusoidal", "learned", "rotary"),
    "precision": ("fp32", "bf16"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `Config`, `--batch-tokens` for `batch_tokens`."""
    for field in dataclasses.fields(Config):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(
                option,
                type=type(field.default),
                default=field.default,
                choices=_CHOICES.get(field.name),
                help=f"(default {field.default})",
            )


def from_arguments(arguments: argparse.Namespace) -> Config:
    """The fields of `Config` among `arguments`; UserError for numbers that make no model."""
    config = Config(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config)})
    for name in ("width", "heads", "layers", "feed_forward", "batch_tokens", "warmup"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    for name in ("dropout", "label_smoothing"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UserError(f"--{name.replace('_', '-')} must be in [0, 1)")
    if config.width % config.heads != 0:
        raise UserError(f"--width {config.width} must be a multiple of --heads {config.heads}")
    if config.max_tokens < 3:
        raise UserError("--max-tokens must be at least 3")
    if config.positions == "rotary" and config.backend == "torch":
        raise UserError("--positions rotary needs --backend fused: torch.nn has no such thing")
    return config


def from_checkpoint(values: dict[str, Any], origin: Path) -> Config:
    """The `Config` that a checkpoint holds; UserError if it is of another program version."""
    names = {field.name for field in dataclasses.fields(Config)}
    if set(values) != names:
        odd = ", ".join(sorted(set(values) ^ names))
        raise UserError(f"{origin} is a checkpoint of another version: {odd}")
    return Config(**values)
