"""Pictures: loss curves, attention maps, time per step against length."""

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
    axes[0].set_ylabel("nats per token: validation, dotted: training (smoothed labels)")
    axes[0].legend()
    _save(figure, path)


def attention(
    weights: Sequence[Tensor],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    path: Path,
    names: tuple[str, str] = ("query", "key"),
) -> None:
    """Weights (H, L, S) of the first and the last layer, the mean of their heads: two panels.

    Args:
        names: what rows and columns are, for the axes.
    """
    shown = dict.fromkeys((0, len(weights) - 1))
    size = (2.2 + (1.2 + 0.27 * len(columns)) * len(shown), 2.2 + 0.27 * len(rows))
    figure, axes = pyplot.subplots(1, len(shown), figsize=size, squeeze=False, sharey=True)
    image = None
    for axis, layer in zip(axes[0], shown, strict=True):
        mean = weights[layer].mean(0).numpy()
        image = axis.imshow(mean, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axis.set_title(f"layer {layer + 1}, mean of {weights[layer].shape[0]} heads", fontsize=9)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_xlabel(names[1])
    axes[0][0].set_ylabel(names[0])
    figure.suptitle(title)
    figure.tight_layout()
    figure.colorbar(image, ax=list(axes[0]), label="attention weight (each row adds up to 1)")
    figure.savefig(path, dpi=130, bbox_inches="tight")  # no label is cut
    pyplot.close(figure)


def step_times(times: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Seconds of one training step against sequence length, for each model."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, points in times.items():
        axis.plot(list(points), [1e3 * t for t in points.values()], "o-", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    lengths = list(next(iter(times.values())))
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("tokens per sentence")
    axis.set_ylabel("ms per training step")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
