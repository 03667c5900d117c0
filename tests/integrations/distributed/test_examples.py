"""examples/distributed: three kinds of parallelism at once, and a sequence that no rank holds."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cases.world import needs_gloo, world

pytestmark = needs_gloo

EXAMPLES = Path(__file__).parents[3] / "examples"
STEPS = 20


def training() -> Any:
    for folder in ("distributed", "language_model"):
        if str(EXAMPLES / folder) not in sys.path:
            sys.path.append(str(EXAMPLES / folder))
    return importlib.import_module("train")


def text() -> torch.Tensor:
    return torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()


def train_on(rank: int, sizes: tuple[int, int, int], folder: str) -> list[float]:
    train = training()
    mesh = train.new_mesh(*sizes)
    model = train.distribute(train.new_model(torch.float64), mesh)
    losses = train.train(model, text(), STEPS, mesh)
    train.save(model, folder)
    return losses


def compare(sizes: tuple[int, int, int], ranks: int, folder: Path) -> None:
    train = training()
    alone = train.new_model(torch.float64)
    expected = train.train(alone, text(), STEPS, None)
    assert expected[-1] < 0.9 * expected[0]
    for losses in world(ranks).run(train_on, sizes, str(folder)):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)
    loaded = train.new_model(torch.float64)
    train.load(loaded, str(folder))
    for (name, a), b in zip(loaded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    _load_into_torch_nn(train, folder, loaded)


def _load_into_torch_nn(train: Any, folder: Path, loaded: nn.Module) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
    parts = {"embedding": nn.Embedding(256, 32), "stack": stack}
    parts["head"] = nn.Linear(32, 256, bias=False)
    plain = nn.ModuleDict(parts).double()
    train.load(plain, str(folder))
    for a, b in zip(plain.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fsdp_tensor_and_context_parallel_train_as_one_process(tmp_path: Path) -> None:
    compare((1, 2, 2), 4, tmp_path)


@pytest.mark.every
def test_the_same_on_eight_ranks(tmp_path: Path) -> None:
    compare((2, 2, 2), 8, tmp_path)


def test_a_long_sequence() -> None:
    """Two ranks against one: the same loss and gradient."""
    shown = []
    for ranks in ("1", "2"):
        command = [sys.executable, "long_context.py", "--tokens", "4096", "--ranks", ranks]
        found = subprocess.run(
            command,
            cwd=EXAMPLES / "distributed",
            env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert found.returncode == 0, found.stderr
        shown.append(found.stdout.partition(": ")[2].split(", ")[:2])
        assert "4096 tokens" in found.stdout
    one, two = ([float(words.split()[-1]) for words in pair] for pair in shown)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-4, atol=1e-6)
