"""`python -m fused_attn demo`: one small language model, trained by stock torch.nn and then fused.

The model predicts the next byte of real text with a causal Transformer. Every run starts from the
same weights and sees the same batches, so the loss curves must agree. How closely is measured, not
guessed: stock torch.nn also trains in float64, and the fused curve may stray from that one at most
three times as far as the stock curve of the same precision does (the budget of gradients).
"""

from __future__ import annotations

import multiprocessing
import resource
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no screen
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from tqdm import tqdm

from .convert import fuse
from .testing import BACKWARD_FACTOR

BYTES = 256
WIDTH, HEADS, LAYERS, FEED_FORWARD = 256, 4, 3, 512
CONTEXT, BATCH = 512, 4
LEARNING_RATE = 1e-3
MAX_TEXT = 8_000_000
SEED = 0

KINDS = ("stock", "fused")
PRECISIONS = ("fp32", "bf16")
ORACLE = ("stock", "fp64")


class LanguageModel(nn.Module):
    """Next-byte prediction with torch.nn's own modules; `fuse` swaps what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FEED_FORWARD, dropout=0.0, batch_first=True, norm_first=True
        )
        final_norm = nn.LayerNorm(WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, final_norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, BYTES)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, 256) for tokens (B, L)."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.encoder(x, mask=self.mask, is_causal=True))


@dataclass(frozen=True)
class Result:
    """Losses of every step, seconds of every step, and bytes of memory beyond the start."""

    losses: list[float]
    seconds: list[float]
    memory: int

    @property
    def tokens_per_second(self) -> float:
        steady = sorted(self.seconds[len(self.seconds) // 5 :])
        return BATCH * CONTEXT / steady[len(steady) // 2]


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
    if len(text) < 2 * CONTEXT:
        raise ValueError(f"`--text` must hold at least {2 * CONTEXT} bytes, got {len(text)}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def build(kind: str, device: torch.device) -> LanguageModel:
    """The model of a run, always from the same weights."""
    torch.manual_seed(SEED)
    model = LanguageModel().to(device)
    if kind == "fused":
        fuse(model)
    return model


def train(kind: str, precision: str, text: Tensor, steps: int) -> Result:
    """Train one model and keep its curve; "bf16" is autocast over float32 weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(kind, device)
    if precision == "fp64":
        model = model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batches = torch.Generator().manual_seed(SEED)
    text = text.to(device)
    losses, seconds = [], []
    before = _memory(device)
    for _ in tqdm(range(steps), desc=f"{kind:>5} {precision}", unit="step"):
        starts = torch.randint(0, len(text) - CONTEXT - 1, (BATCH, 1), generator=batches)
        rows = text[starts.to(device) + torch.arange(CONTEXT + 1, device=device)]
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
    return Result(losses, seconds, _memory(device) - before)


def _memory(device: torch.device) -> int:
    """Peak bytes so far: of torch's allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _train_apart(kind: str, precision: str, text: Tensor, steps: int) -> Result:
    """`train` in a process of its own: peak memory is a process's, and runs stay independent."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(train, kind, precision, text, steps).result()


def drift(a: Result, b: Result) -> float:
    """Root mean square distance of two loss curves."""
    squares = [(x - y) ** 2 for x, y in zip(a.losses, b.losses, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def run(path: Path | None, steps: int, output: Path) -> int:
    """Train every run, print the table, draw the curves; 0 if the curves agree."""
    try:
        text = load_text(path)
    except (FileNotFoundError, ValueError) as error:
        print(error)
        return 2
    print(f"{len(text):,} bytes of text, {steps} steps of {BATCH} x {CONTEXT} bytes a run")
    runs = [ORACLE, *((kind, precision) for precision in PRECISIONS for kind in KINDS)]
    results = {run: _train_apart(*run, text, steps) for run in runs}
    print(f"\n{'run':<12} {'loss':>8} {'tokens/s':>10} {'ratio':>6} {'memory MB':>10}")
    agree = True
    for precision in PRECISIONS:
        stock, fused = (results[kind, precision] for kind in KINDS)
        for kind, result in (("stock", stock), ("fused", fused)):
            ratio = result.tokens_per_second / stock.tokens_per_second
            print(
                f"{kind} {precision:<6} {result.losses[-1]:8.4f} {result.tokens_per_second:10,.0f} "
                f"{ratio:6.2f} {result.memory / 2**20:10.0f}"
            )
        ours, theirs = drift(fused, results[ORACLE]), drift(stock, results[ORACLE])
        agrees = ours <= BACKWARD_FACTOR * theirs
        agree = agree and agrees
        print(
            f"  curves {'agree' if agrees else 'DO NOT AGREE'}: off the float64 curve by "
            f"{ours:.2e} fused, {theirs:.2e} stock (allowed {BACKWARD_FACTOR:g} times that)"
        )
    draw(results, output)
    print(f"curves drawn in {output}")
    return 0 if agree else 1


def draw(results: dict[tuple[str, str], Result], output: Path) -> None:
    """Both curves of each precision, one panel each, as a PNG."""
    figure, panels = pyplot.subplots(1, len(PRECISIONS), figsize=(10, 4), sharey=True)
    for panel, precision in zip(panels, PRECISIONS, strict=True):
        for kind, style in (("stock", "-"), ("fused", "--")):
            result = results[kind, precision]
            label = f"{kind}, {result.tokens_per_second:,.0f} tokens/s"
            panel.plot(result.losses, style, label=label)
        panel.set(title=precision, xlabel="step", ylabel="loss (nats a byte)")
        panel.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
