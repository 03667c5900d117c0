"""The table over several runs: `python report.py RUN... [--steps-against-length]`.

Each run is a folder that train.py and evaluate.py have filled.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import plots
import torch
from batches import Batch
from errors import UserError, run
from training import BEST, load_model, loss_of
from vocabulary import BOS

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def read_json(path: Path, made_by: str) -> Any:
    """What a run's file holds; UserError if it is not there."""
    if not path.is_file():
        raise UserError(f"{path} is not there: run {made_by} first")
    return json.loads(path.read_text(encoding="utf-8"))


def seconds_to(history: list[dict[str, float]], loss: float) -> float | None:
    """Seconds of training until the validation loss was at most `loss`, or None."""
    return next((r["seconds"] for r in history if r["val_loss"] <= loss), None)


def table(runs: dict[str, tuple[list[dict[str, float]], dict[str, Any]]], loss: float) -> str:
    """The comparison as a Markdown table."""
    groups = list(dict.fromkeys(g for _, result in runs.values() for g in result["by_length"]))
    head = ["run", "BLEU", *(f"{group} words" for group in groups)]
    head += ["best val. loss", "target tokens/s", f"s to val. loss {loss:g}"]
    lines = [head, ["---"] * len(head)]
    for name, (history, result) in runs.items():
        last, reached = history[-1], seconds_to(history, loss)
        by_length = result["by_length"]
        lines.append([
            name,
            f"{result['bleu']:.2f}",
            *(f"{by_length[g]['bleu']:.2f}" if g in by_length else "-" for g in groups),
            f"{min(record['val_loss'] for record in history):.4f}",
            f"{last['tokens'] / last['seconds']:.0f}",
            "not reached" if reached is None else f"{reached:.0f}",
        ])  # fmt: skip
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Cells as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps_table(times: dict[str, dict[int, float]]) -> str:
    """Milliseconds of a training step at each length as a Markdown table."""
    lengths = list(next(iter(times.values())))
    lines = [["ms per training step at", *(f"{length} tokens" for length in lengths)]]
    lines.append(["---"] * len(lines[0]))
    lines += [[name, *(f"{1e3 * found[n]:.0f}" for n in lengths)] for name, found in times.items()]
    return markdown(lines)


def step_seconds(model: Any, config: Any, length: int, batch_tokens: int, repeats: int) -> float:
    """Median seconds of forward and backward on sentences of `length` tokens."""
    vocab = model.generator.weight.shape[0]
    device = next(model.parameters()).device
    shape = (max(1, batch_tokens // length), length)
    tokens = torch.randint(BOS + 2, vocab, shape, device=device)
    batch = Batch(tokens, torch.nn.functional.pad(tokens, (1, 0), value=BOS))
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        loss_of(model, batch, config, config.label_smoothing).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return sorted(times[1:])[repeats // 2]


def time_steps(folders: list[Path], arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Seconds a step of each run's model at each length; the models take turns."""
    models = {}
    for folder in folders:
        _, config, vocabulary, _ = load_model(folder / BEST, arguments.device)
        # Weights do not matter for the time, but positions must reach the longest sentence.
        longer = type(config)(**{**vars(config), "max_tokens": max(arguments.lengths) + 2})
        models[folder.name] = (longer.build(len(vocabulary)).to(arguments.device), longer)
    times: dict[str, dict[int, float]] = {name: {} for name in models}
    for length in arguments.lengths:
        for name, (model, config) in models.items():
            tokens = (length, arguments.batch_tokens, arguments.repeats)
            times[name][length] = step_seconds(model, config, *tokens)
            print(f"{name}: {length} tokens, {1e3 * times[name][length]:.1f} ms")
    return times


def main() -> None:
    """Print the table; write the curves and, if asked for, the times of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--loss", type=float, default=2.5, help="validation loss to reach")
    parser.add_argument("--steps-against-length", action="store_true", help="time training steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of the timed steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    if min(*arguments.lengths, arguments.repeats, arguments.batch_tokens) < 1:
        raise UserError("--lengths, --repeats and --batch-tokens must be positive")
    names = [folder.name for folder in arguments.runs]
    if len(set(names)) != len(names):
        raise UserError(f"runs must have names of their own, got {', '.join(names)}")
    runs = {
        folder.name: (
            read_json(folder / "history.json", "train.py"),
            read_json(folder / "evaluation.json", "evaluate.py"),
        )
        for folder in arguments.runs
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(runs, arguments.loss)
    plots.curves({name: h for name, (h, _) in runs.items()}, arguments.out / "loss.png")
    if arguments.steps_against_length:
        times = time_steps(arguments.runs, arguments)
        plots.step_times(times, arguments.out / "steps.png")
        text += f"\n\n{steps_table(times)}"
    print(text)
    (arguments.out / "report.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
