"""Fused against stock torch.nn: `python backends.py RUN...`.

The runs differ in --backend and --seed and in nothing else; each seed has one run of either
backend, of as many steps.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import checkpoint
from config import Config, from_checkpoint
from errors import UserError, run
from training import LAST

BACKENDS = ("fused", "torch")
Record = dict[str, float]


def read_run(folder: Path) -> tuple[Config, Record]:
    """Configuration and last validation of a run.

    Raises:
        UserError: there is none.
    """
    state = checkpoint.load(folder / LAST)
    return from_checkpoint(state["config"], folder / LAST), state["history"][-1]


def pair(runs: dict[Path, tuple[Config, Record]]) -> dict[int, dict[str, Record]]:
    """The last validations by seed and backend.

    Raises:
        UserError: two runs are not comparable, or a seed lacks a run.
    """
    pairs: dict[int, dict[str, Record]] = {}
    [(first, (config, record)), *_] = runs.items()
    for folder, (other, found) in runs.items():
        same = {**vars(config), "backend": other.backend, "seed": other.seed}
        if vars(other) != same or found["step"] != record["step"]:
            raise UserError(f"{folder} differs from {first} in more than backend and seed")
        if other.backend in pairs.setdefault(other.seed, {}):
            raise UserError(f"seed {other.seed} has two runs with --backend {other.backend}")
        pairs[other.seed][other.backend] = found
    for seed, sides in pairs.items():
        for backend in BACKENDS:
            if backend not in sides:
                raise UserError(f"seed {seed} lacks a run with --backend {backend}")
    return dict(sorted(pairs.items()))


def table(pairs: dict[int, dict[str, Record]]) -> str:
    """Validation loss and speed of both backends, as a Markdown table and a line of summary."""
    lines: list[list[Any]] = [
        ["seed", "val. loss fused", "torch", "difference", "tokens/s fused", "torch", "ratio"],
        ["---"] * 7,
    ]
    losses: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    ratios = []
    for seed, sides in pairs.items():
        loss = {b: sides[b]["val_loss"] for b in BACKENDS}
        speed = {b: sides[b]["tokens"] / sides[b]["seconds"] for b in BACKENDS}
        for backend in BACKENDS:
            losses[backend].append(loss[backend])
        ratios.append(speed["fused"] / speed["torch"])
        lines.append([
            seed, *(f"{loss[b]:.4f}" for b in BACKENDS), f"{loss['fused'] - loss['torch']:+.4f}",
            *(f"{speed[b]:.0f}" for b in BACKENDS), f"{ratios[-1]:.2f}",
        ])  # fmt: skip
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    means = {b: statistics.fmean(losses[b]) for b in BACKENDS}
    text += f"\n\nMean difference {means['fused'] - means['torch']:+.4f}"
    if len(pairs) > 1:
        spread = ", ".join(f"{b} {statistics.stdev(losses[b]):.4f}" for b in BACKENDS)
        text += f"; standard deviation over seeds: {spread}"
    return f"{text}; median ratio of speeds {statistics.median(ratios):.2f}."


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of backends.md")
    arguments = parser.parse_args()
    pairs = pair({folder: read_run(folder) for folder in arguments.runs})
    text = table(pairs)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "backends.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
