"""Train a translation model: `python train.py --data DIR --out RUN`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import checkpoint
import config as configuration
import plots
import torch
from batches import Dataset
from corpus import Pairs, read_pairs
from errors import UserError, run
from training import CLOCKS, LAST, Trainer
from vocabulary import Vocabulary

VOCABULARY = "vocabulary.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.*, val.*")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run's results")
    parser.add_argument("--steps", type=int, default=6000, help="(default 6000)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of training, at most")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="that minutes are of")
    parser.add_argument("--validate-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--checkpoint-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from RUN/last.pt")
    parser.add_argument("--vocabulary", type=Path, help="that of another run, instead of a new one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    configuration.add_arguments(parser)
    arguments = parser.parse_args()
    for name in ("steps", "validate_every", "checkpoint_every"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    if arguments.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    if arguments.device == "cuda" and arguments.clock == "cpu":
        raise UserError("--clock cpu knows nothing of what a GPU does: use --clock wall")
    return arguments


def vocabulary_of(arguments: argparse.Namespace, train: Pairs, size: int) -> Vocabulary:
    """The run's own if it is resumed, the one that is named, or a new one; kept in the run."""
    own: Path = arguments.out / VOCABULARY
    given = own if arguments.resume else arguments.vocabulary
    if given is None:
        vocabulary = Vocabulary.train([*train.sources, *train.targets], size)
    elif given.is_file():
        vocabulary = Vocabulary.from_text(given.read_text(encoding="utf-8"), given)
    else:
        raise UserError(f"there is no vocabulary {given}")
    text = vocabulary.to_text().encode()
    checkpoint.replace_file(own, lambda file: file.write(text))
    return vocabulary


def read(arguments: argparse.Namespace, split: str, config: configuration.Config) -> Pairs:
    """A part of the corpus; says what was left out."""
    pairs = read_pairs(arguments.data, split, config.source, config.target)
    left_out = f", {pairs.empty} pairs with an empty line left out" if pairs.empty else ""
    print(f"{split}: {len(pairs)} pairs{left_out}")
    return pairs


def encode(name: str, pairs: Pairs, vocabulary: Vocabulary, max_tokens: int) -> Dataset:
    """The pairs as tokens; says how many are too long."""
    data = Dataset(pairs, vocabulary, max_tokens)
    if data.too_long:
        print(f"{name}: {data.too_long} pairs of {max_tokens} tokens or more left out")
    return data


def show(trainer: Trainer, out: Path) -> None:
    """After each validation: a line, the curves, and the records."""
    record = trainer.history[-1]
    print(
        f"\nstep {record['step']}: training loss {record['train_loss']:.4f}, validation loss "
        f"{record['val_loss']:.4f}, {record['tokens'] / record['seconds']:.0f} target tokens/s"
    )
    text = json.dumps(trainer.history, indent=1).encode()
    checkpoint.replace_file(out / "history.json", lambda file: file.write(text))
    plots.curves({out.name: trainer.history}, out / "loss.png")


def main() -> None:
    """Train or go on training."""
    arguments = parse()
    config = configuration.from_arguments(arguments)
    out: Path = arguments.out
    if (out / LAST).exists() and not arguments.resume:
        raise UserError(f"{out / LAST} exists: give --resume to go on, or another --out")
    if arguments.resume and not (out / LAST).exists():
        raise UserError(f"--resume: there is no checkpoint {out / LAST}")
    train, val = (read(arguments, split, config) for split in ("train", "val"))
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = vocabulary_of(arguments, train, config.vocab_size)
    trainer = Trainer(
        config,
        vocabulary,
        encode("train", train, vocabulary, config.max_tokens),
        encode("val", val, vocabulary, config.max_tokens),
        arguments.device,
        arguments.clock,
    )
    if arguments.resume:
        trainer.restore(out / LAST)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{config.model}, {config.backend}: {parameters / 1e6:.2f} M parameters")
    trainer.run(
        out,
        arguments.steps,
        arguments.minutes,
        arguments.validate_every,
        arguments.checkpoint_every,
        lambda trainer: show(trainer, out),
    )
    print(f"best validation loss {trainer.best:.4f}; the model is {out / 'best.pt'}")


if __name__ == "__main__":
    run(main)
