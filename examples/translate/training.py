"""The training loop: it can stop after any step and go on as if it had not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import torch
import torch.nn.functional as F
from batches import Batch, Dataset
from config import Config, from_checkpoint
from errors import UserError
from torch import Tensor, nn
from tqdm import tqdm
from vocabulary import PAD, Vocabulary

LAST, BEST = "last.pt", "best.pt"
# What a run's seconds are: on a machine that others use as well, CPU time is the fair measure of a
# run on one thread. (With several threads it adds up what each of them spends, waiting included.)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def loss_of(model: nn.Module, batch: Batch, config: Config, smoothing: float) -> Tensor:
    """Cross entropy a token of the target, in nats."""
    device_type = batch.src.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = model(batch.src, batch.tgt[:, :-1])
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        batch.tgt[:, 1:].flatten(),
        ignore_index=PAD,
        label_smoothing=smoothing,
    )


@torch.no_grad()
def validation_loss(model: nn.Module, data: Dataset, config: Config, device: str) -> float:
    """Mean cross entropy a token of `data`, without label smoothing."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for indices in data.batches(config.batch_tokens):
        batch = data.batch(indices)
        count = batch.target_tokens
        total += float(loss_of(model, batch.to(device), config, 0.0)) * count
        tokens += count
    model.train(training)
    return total / tokens


class Trainer:
    """One run: model, optimizer, and where in the data it is.

    Attributes:
        step: optimizer steps done.
        history: one record a validation: step, train_loss (label smoothing included, mean since
            the last one), val_loss, seconds (of `clock`) and tokens of training so far.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        train: Dataset,
        val: Dataset,
        device: str,
        clock: str = "wall",
    ) -> None:
        for name, data in (("training", train), ("validation", val)):
            if not len(data):
                raise UserError(f"no {name} pair is shorter than --max-tokens {config.max_tokens}")
        torch.manual_seed(config.seed)
        self.config, self.vocabulary, self.device = config, vocabulary, device
        self._clock = CLOCKS[clock]
        self.train_data, self.val_data = train, val
        self.model = config.build(len(vocabulary)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.98), eps=1e-9)
        self.step = self.epoch = self.next_batch = 0
        self.history: list[dict[str, float]] = []
        self.seconds, self.tokens = 0.0, 0
        self._loss_sum, self._loss_count = 0.0, 0

    @property
    def best(self) -> float:
        """The lowest validation loss so far."""
        return min((record["val_loss"] for record in self.history), default=float("inf"))

    def run(
        self,
        out: Path,
        steps: int,
        minutes: float,
        validate_every: int,
        checkpoint_every: int,
        on_validation: Callable[[Trainer], None],
    ) -> None:
        """Train up to step `steps`, or for `minutes` in all; validate and save at the end.

        Args:
            on_validation: called after each validation.
        """
        self.model.train()
        bar = tqdm(total=steps, initial=self.step, unit="step", dynamic_ncols=True)
        while self.step < steps and self.seconds < 60.0 * minutes:
            loss = self._one_step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", epoch=self.epoch, refresh=False)
            if self.step % validate_every == 0:
                self._validate(out, on_validation)
            if self.step % checkpoint_every == 0:
                self.save(out)
        bar.close()
        if not self.history or self.history[-1]["step"] != self.step:
            self._validate(out, on_validation)
        self.save(out)

    def save(self, out: Path) -> None:
        """Everything that `restore` needs, to `out`/last.pt."""
        names = ("step", "epoch", "next_batch", "history", "seconds", "tokens")
        state = {name: getattr(self, name) for name in names}
        state |= {"loss_sum": self._loss_sum, "loss_count": self._loss_count}
        state |= {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if self.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state()
        checkpoint.save(out / LAST, self._model_state() | state)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UserError: it is of another configuration or vocabulary.
        """
        state = checkpoint.load(path)
        found = from_checkpoint(state["config"], path)
        if found != self.config:
            ours = vars(self.config)
            changed = [
                f"--{name.replace('_', '-')} {value}"
                for name, value in vars(found).items()
                if value != ours[name]
            ]
            raise UserError(f"{path} was trained with {' '.join(changed)}: resume with the same")
        if state["vocabulary"] != self.vocabulary.to_text():
            raise UserError(f"{path} was trained with another vocabulary")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "epoch", "next_batch", "history", "seconds", "tokens"):
            setattr(self, name, state[name])
        self._loss_sum, self._loss_count = state["loss_sum"], state["loss_count"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])

    def _one_step(self) -> float:
        start = self._clock()
        batch = self._take_batch()
        tokens = batch.target_tokens
        batch = batch.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model, batch, self.config, self.config.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        value = float(loss.detach())  # waits for the device, so that the clock is right
        self.step += 1
        self.tokens += tokens
        self.seconds += self._clock() - start
        self._loss_sum += value
        self._loss_count += 1
        return value

    def _take_batch(self) -> Batch:
        """The order is a function of seed and epoch, so a place in it is two numbers."""
        seed = 1_000_003 * self.config.seed + self.epoch
        if getattr(self, "_order_of", None) != seed:
            self._order = self.train_data.batches(self.config.batch_tokens, seed)
            self._order_of = seed
        indices = self._order[self.next_batch]
        self.next_batch += 1
        if self.next_batch == len(self._order):
            self.epoch, self.next_batch = self.epoch + 1, 0
        return self.train_data.batch(indices)

    def _validate(self, out: Path, on_validation: Callable[[Trainer], None]) -> None:
        loss = validation_loss(self.model, self.val_data, self.config, self.device)
        improved = loss < self.best
        self.history.append({
            "step": self.step,
            "train_loss": self._loss_sum / max(1, self._loss_count),
            "val_loss": loss,
            "seconds": self.seconds,
            "tokens": self.tokens,
        })  # fmt: skip
        self._loss_sum, self._loss_count = 0.0, 0
        if improved:
            checkpoint.save(out / BEST, self._model_state() | {"history": self.history})
        on_validation(self)

    def _model_state(self) -> dict[str, Any]:
        return {
            "config": dict(vars(self.config)),
            "vocabulary": self.vocabulary.to_text(),
            "model": self.model.state_dict(),
        }


def load_model(path: Path, device: str) -> tuple[Any, Config, Vocabulary, dict[str, Any]]:
    """The model of a checkpoint in eval mode, its configuration, vocabulary and all of its state.

    Raises:
        UserError: there is none, or it is not one of this program.
    """
    state = checkpoint.load(path)
    config = from_checkpoint(state["config"], path)
    vocabulary = Vocabulary.from_text(state["vocabulary"], path)
    model = config.build(len(vocabulary))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), config, vocabulary, state
