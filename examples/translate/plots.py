"""Pictures: loss curves, attention maps, time of a step against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no screen
from matplotlib import pyplot
from torch import Tensor


def curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Training and validation loss of each run against steps and against seconds."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, key, label in zip(
        axes, ("step", "seconds"), ("steps", "seconds of training"), strict=True
    ):
        for name, history in histories.items():
            x = [record[key] for record in history]
            [line] = axis.plot(x, [record["val_loss"] for record in history], label=name)
            train = [record["train_loss"] for record in history]
            axis.plot(x, train, ":", color=line.get_color())
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats a token: validation, dotted: training (smoothed labels)")
    axes[0].legend()
    _save(figure, path)


def attention(
    weights: Sequence[Tensor], rows: Sequence[str], columns: Sequence[str], title: str, path: Path
) -> None:
    """Weights (H, L, S) of each layer as a grid, a layer a line, a head a column."""
    layers, heads = len(weights), weights[0].shape[0]
    size = (1.2 + 2.6 * heads, 0.8 + 2.6 * layers)
    figure, axes = pyplot.subplots(layers, heads, figsize=size, squeeze=False)
    for i, layer in enumerate(weights):
        for j in range(heads):
            axis: Any = axes[i][j]
            axis.imshow(layer[j].numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            axis.set_title(f"layer {i + 1}, head {j + 1}", fontsize=7)
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=5)
            axis.set_yticks(range(len(rows)), rows, fontsize=5)
    figure.suptitle(title)
    _save(figure, path)


def step_times(times: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Seconds of one training step against sequence length, for each model."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, points in times.items():
        axis.plot(list(points), [1e3 * t for t in points.values()], "o-", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    lengths = list(next(iter(times.values())))
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("tokens a sentence")
    axis.set_ylabel("ms a training step")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
