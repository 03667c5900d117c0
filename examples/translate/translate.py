"""Translate lines: `python translate.py --checkpoint RUN/best.pt < text`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from errors import UserError, run
from training import load_model
from translating import translate


def main() -> None:
    """Read lines, write lines; an empty line stays one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--beams", type=int, default=4, help="1 is greedy (default 4)")
    parser.add_argument("--length-penalty", type=float, default=0.6, help="(default 0.6)")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences (default 32)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    if arguments.beams < 1 or arguments.batch_size < 1:
        raise UserError("--beams and --batch-size must be positive")
    model, config, vocabulary, _ = load_model(arguments.checkpoint, arguments.device)
    sentences = [line.strip() for line in sys.stdin]
    found, cut = translate(
        model,
        config,
        vocabulary,
        sentences,
        arguments.beams,
        arguments.length_penalty,
        arguments.batch_size,
        arguments.device,
        quiet=True,
    )
    print("\n".join(found))
    if cut:
        lines = ", ".join(str(i + 1) for i in cut)
        print(f"cut to {config.max_tokens - 1} tokens: line {lines}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
