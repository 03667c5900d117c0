"""`python -m fused_attn demo`: one small language model, trained by stock torch.nn and then fused.

The model predicts the next byte of real text with a causal Transformer. Every run starts from the
same weights and sees the same batches, so the loss curves must agree. How closely is measured, not
guessed: stock torch.nn also trains in float64, and the fused curve may stray from that one at most
three times as far as the stock curve of the same precision does (the budget of gradients).

A step of every curve is timed first, which gives an estimate of the whole. What the time does not
hold is left out, and said to be: some CPUs take seconds per step in bfloat16. Where it does not
even hold the first two curves, all curves have fewer steps. Interrupted (Ctrl-C), it shows and
draws what it has by then.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no screen
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from tqdm import tqdm

from . import demo_model
from .convert import fuse
from .testing import BACKWARD_FACTOR

ResultT = TypeVar("ResultT")

BATCH = 4
LEARNING_RATE = 1e-3
MAX_TEXT = 8_000_000
SEED = 0

KINDS = ("stock", "fused")
PRECISIONS = ("fp32", "bf16")
Curve = tuple[str, str]  # kind and precision
ORACLE: Curve = ("stock", "fp64")
# The most telling first: what the time does not hold is left out from the end.
CURVES: tuple[Curve, ...] = (
    ("stock", "fp32"), ("fused", "fp32"), ORACLE, ("stock", "bf16"), ("fused", "bf16"),
)  # fmt: skip

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
MINUTES = 3.0
MARGIN = 0.8  # of the time that is planned for: steps take longer beside busy neighbours
LEAST_STEPS = 5  # of a curve that shows anything
TIMING = 0.3  # of the time may be taken by steps that are only timed
SLOW_STEP = 1.0  # seconds; of a faster one the second is timed, which warms nothing up


# Set where the demo was interrupted; only in processes that `_apart` started.
_stop: Any = None


class Interrupted(KeyboardInterrupt):
    """The demo was interrupted; `result` is what the call had by then."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


@dataclass(frozen=True)
class Result:
    """Losses of every step, seconds of every step, and bytes of memory beyond the start."""

    losses: list[float]
    seconds: list[float]
    memory: int

    @property
    def tokens_per_second(self) -> float:
        steady = sorted(self.seconds[len(self.seconds) // 5 :])
        return BATCH * demo_model.CONTEXT / steady[len(steady) // 2]


def load_text(path: Path | None) -> Tensor:
    """The bytes of `path`, a file or all files below a folder, as int64 (N,).

    Raises:
        FileNotFoundError, ValueError: there is nothing at `path`, or too little for a batch.
    """
    if path is None:
        path = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path.glob("*.py"))
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"`--text` must be a file or a folder, found nothing at {path}")
    text = b"".join(file.read_bytes() for file in files)[:MAX_TEXT]
    if len(text) < 2 * demo_model.CONTEXT:
        least = 2 * demo_model.CONTEXT
        raise ValueError(f"`--text` must hold at least {least} bytes, got {len(text)}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def build(kind: str, device: torch.device) -> demo_model.LanguageModel:
    """The model of a run, always from the same weights."""
    torch.manual_seed(SEED)
    model = demo_model.LanguageModel().to(device)
    if kind == "fused":
        fuse(model, linears=True)
    return model


def train(
    curve: Curve, text: Tensor, steps: int, limit: float = float("inf"), quiet: bool = False
) -> Result:
    """Train one model and keep its curve; "bf16" is autocast over float32 weights.

    Ends early, with the step after which `limit` seconds hold no other, or the demo is interrupted.
    """
    kind, precision = curve
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(kind, device)
    if precision == "fp64":
        model = model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batches = torch.Generator().manual_seed(SEED)
    text = text.to(device)
    losses, seconds = [], []
    before = _memory(device)
    for _ in tqdm(range(steps), desc=f"{kind:>5} {precision}", unit="step", disable=quiet):
        highest = len(text) - demo_model.CONTEXT - 1
        starts = torch.randint(0, highest, (BATCH, 1), generator=batches)
        rows = text[starts.to(device) + torch.arange(demo_model.CONTEXT + 1, device=device)]
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(rows[:, :-1])
        logits = logits.flatten(0, 1)
        if precision == "bf16":
            logits = logits.float()
        loss = nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())  # waits for a GPU, so the clock may stop
        seconds.append(time.perf_counter() - start)
        interrupted = _stop is not None and _stop.is_set()
        if interrupted or sum(seconds) + seconds[-1] > limit:
            break
    return Result(losses, seconds, _memory(device) - before)


def _memory(device: torch.device) -> int:
    """Peak bytes so far: of torch's allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def curves_of(precisions: Sequence[str]) -> tuple[Curve, ...]:
    """The curves of some precisions, with the float64 one that they are held against."""
    pairs = [curve for curve in CURVES if curve != ORACLE and curve[1] in precisions]
    return (*pairs[:2], ORACLE, *pairs[2:])


def time_steps(
    text: Tensor, limit: float, curves: Sequence[Curve] = CURVES
) -> tuple[dict[Curve, float], float]:
    """Seconds of a step of every curve that it comes to within `limit`, and seconds of it all."""
    start, step = time.monotonic(), {}
    for curve in curves:
        if time.monotonic() - start < limit:
            step[curve] = train(curve, text, 2, limit=2 * SLOW_STEP, quiet=True).seconds[-1]
    return step, time.monotonic() - start


def _apart(function: Callable[..., ResultT], *args: Any) -> ResultT:
    """Call in a process of its own: peak memory is a process's, and curves stay independent.

    Raises:
        Interrupted: by Ctrl-C; the process finishes its step and gives back what it has.
    """
    # Threads that spin while they wait take the cores from each other beside busy neighbours.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(1, context, _begin, (stop,)) as executor:
        future = executor.submit(function, *args)
        try:
            return future.result()
        except KeyboardInterrupt:
            stop.set()
            raise Interrupted(future.result()) from None


def _begin(stop: Any) -> None:
    """A terminal's Ctrl-C reaches all processes: only the first one decides what comes of it."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def drift(a: Result, b: Result) -> float:
    """Root mean square distance of two loss curves."""
    squares = [(x - y) ** 2 for x, y in zip(a.losses, b.losses, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def affordable(steps: int, step: dict[Curve, float], limit: float) -> int:
    """As many of `steps` as `limit` seconds hold of the first two curves, if that is a curve."""
    pair = list(step.values())[:2]
    if len(pair) < 2 or steps * sum(pair) <= limit:
        return steps
    fewer = int(MARGIN * limit / sum(pair))
    return fewer if fewer >= LEAST_STEPS else steps


def fitting(seconds: dict[Curve, float], limit: float) -> list[Curve]:
    """The curves that `limit` seconds hold, by what each takes; the first ones come first."""
    chosen = []
    for curve, needed in seconds.items():
        if needed <= limit:
            chosen.append(curve)
            limit -= needed
    return chosen


def run(
    path: Path | None,
    steps: int,
    output: Path,
    minutes: float = MINUTES,
    precisions: Sequence[str] = PRECISIONS,
) -> int:
    """Train every curve that `minutes` hold, print the table, draw them; 0 if they agree.

    Interrupted, it prints and draws what there is, and returns 130.
    """
    start = time.monotonic()
    try:
        text = load_text(path)
    except (FileNotFoundError, ValueError) as error:
        print(error)
        return 2
    batch = f"{BATCH} x {demo_model.CONTEXT}"
    print(f"{len(text):,} bytes of text, {steps} steps of {batch} bytes a curve")
    end = start + 60.0 * minutes * MARGIN
    results: dict[Curve, Result] = {}
    step: dict[Curve, float] = {}
    interrupted = False
    try:
        _train_what_fits(text, steps, end, curves_of(precisions), results, step)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: this is what there is")
        if not results:
            return INTERRUPTED
    print(f"\n{'curve':<12} {'loss':>8} {'tokens/s':>10} {'ratio':>6} {'memory MB':>10}")
    agree = True
    for precision in precisions:
        for kind in KINDS:
            print(_row((kind, precision), results, step))
        agree = _compare(precision, results) and agree
    draw(results, output, precisions)
    print(f"curves drawn in {output}")
    if interrupted:
        return INTERRUPTED
    return 0 if agree else 1


def _train_what_fits(
    text: Tensor,
    steps: int,
    end: float,
    curves: Sequence[Curve],
    results: dict[Curve, Result],
    step: dict[Curve, float],
) -> None:
    """Fill in the curves that are done by `end` (of `time.monotonic`), and seconds per step.

    Raises:
        KeyboardInterrupt: the curve that was being trained is then among `results`, a short one.
    """
    start = time.monotonic()
    times, timed = _apart(time_steps, text, TIMING * (end - start), curves)
    step.update(times)
    start_up = time.monotonic() - start - timed  # what a process takes to start here
    asked, left = steps, end - time.monotonic()
    steps = affordable(asked, step, left - 2 * start_up)
    if steps < asked:
        print(f"{steps} steps in place of {asked}: there is no time for more, see `--minutes`")
    needed = {curve: start_up + steps * seconds for curve, seconds in step.items()}
    chosen = fitting(needed, left)
    about = sum(needed[curve] for curve in chosen) / 60
    print(f"{len(chosen)} curves of {steps} steps: about {about:.1f} minutes from here", flush=True)
    for curve in curves:
        result = None
        if curve in chosen:
            chosen.remove(curve)  # one that is slower than it was timed leaves the others theirs
            left = end - time.monotonic() - start_up - sum(needed[other] for other in chosen)
            try:
                result = _apart(train, curve, text, steps, max(left, 0.0))
            except Interrupted as stopped:
                results[curve] = stopped.result
                raise
        if result is not None and len(result.losses) == steps:
            results[curve] = result
            continue
        if result is not None:
            step[curve] = max(result.seconds)
        print(_left_out(curve, step.get(curve), steps))


def _left_out(curve: Curve, step: float | None, steps: int) -> str:
    """Why a curve is not drawn."""
    name = " ".join(curve)
    if step is None:
        return f"left out: {name}, steps of the others took too long to time one of it"
    return (
        f"left out: {name}, a step takes {step:.2f} s and {steps} of them "
        f"{steps * step / 60:.1f} minutes; `--minutes` and `--steps` change what there is time for"
    )


def _row(curve: Curve, results: dict[Curve, Result], step: dict[Curve, float]) -> str:
    """A line of the table; of a curve that was left out, the speed of its timed step."""

    def speed(curve: Curve) -> float:
        if curve in results:
            return results[curve].tokens_per_second
        return BATCH * demo_model.CONTEXT / step.get(curve, float("inf"))

    result, name, stock = results.get(curve), " ".join(curve), speed(("stock", curve[1]))
    loss = "left out" if result is None else f"{result.losses[-1]:.4f}"
    ratio = f"{speed(curve) / stock:6.2f}" if stock else ""
    memory = "" if result is None else f"{result.memory / 2**20:.0f}"
    return f"{name:<12} {loss:>8} {speed(curve):10,.0f} {ratio:>6} {memory:>10}".rstrip()


def _compare(precision: str, results: dict[Curve, Result]) -> bool:
    """Print whether stock and fused agree in a precision; False if they do not."""
    needed = (ORACLE, *((kind, precision) for kind in KINDS))
    missing = [" ".join(curve) for curve in needed if curve not in results]
    if missing:
        print(f"  curves not compared: {', '.join(missing)} left out")
        return True
    oracle, stock, fused = (results[curve] for curve in needed)
    if len({len(result.losses) for result in (oracle, stock, fused)}) > 1:
        print("  curves not compared: they were interrupted after different numbers of steps")
        return True
    ours, theirs = drift(fused, oracle), drift(stock, oracle)
    agrees = ours <= BACKWARD_FACTOR * theirs
    print(
        f"  curves {'agree' if agrees else 'DO NOT AGREE'}: off the float64 curve by "
        f"{ours:.2e} fused, {theirs:.2e} stock (allowed {BACKWARD_FACTOR:g} times that)"
    )
    return agrees


def draw(
    results: dict[Curve, Result], output: Path, precisions: Sequence[str] = PRECISIONS
) -> None:
    """The curves of each precision, one panel each, as a PNG."""
    figure, panels = pyplot.subplots(
        1, len(precisions), figsize=(5 * len(precisions), 4), sharey=True, squeeze=False
    )
    for panel, precision in zip(panels[0], precisions, strict=True):
        for kind, style in (("stock", "-"), ("fused", "--")):
            result = results.get((kind, precision))
            if result is not None:
                label = f"{kind}, {result.tokens_per_second:,.0f} tokens/s"
                panel.plot(result.losses, style, label=label)
        left_out = [kind for kind in KINDS if (kind, precision) not in results]
        title = f"{precision}, without {' and '.join(left_out)}" if left_out else precision
        panel.set(title=title, xlabel="step", ylabel="loss (nats per byte)")
        if len(left_out) < len(KINDS):
            panel.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
