"""How many kernels a training run compiles as its lengths and dropout probabilities vary."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
# Every length up to one tile of each kind, and around all multiples of 64 from there to 2000.
LENGTHS = [*range(1, 66), *(n + i for n in range(128, 2000, 64) for i in (-1, 0, 1, 16)), 2000]

# forward (twice: from length 512 on by tensor descriptors), row statistics, dK/dV, dQ.
ATTENTION = 5
MOST = {
    "full": ATTENTION,
    "causal": ATTENTION,
    "padding": ATTENTION + 1,
    "dropout": ATTENTION,
    "bias": 2 * (ATTENTION + 1),  # rows at multiples of 16 elements, or not
    "mask": 4 * ATTENTION + 5,  # and listed beforehand, or not; 2 + 3 kernels that list
    "decode": 3,
    "layer norm": 2,
    "residual, dropout, norm": 2,
    "bias, activation": 2,
    "bias, activation, dropout": 2,
}


@functools.cache
def counted() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cases.count_compilations", *map(str, LENGTHS)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MOST)
def test_lengths_and_probabilities_are_arguments(name: str) -> None:
    """A number that a kernel is specialised on would show as one more compilation."""
    assert 0 < counted()[name]["found"] <= MOST[name]


@pytest.mark.parametrize("name", MOST)
def test_warming_up_leaves_nothing_to_compile(name: str) -> None:
    assert counted()[name]["warm"] > 0
    assert counted()[name]["new"] == []


def test_constants_of_a_kernel_can_be_written_as_json() -> None:
    """Triton's compile hooks do that; the counting above goes through one."""
    from fused_attn.ops.attention.triton.launcher import KernelConfig

    small = KernelConfig(BLOCK_M=16)
    config = KernelConfig(BLOCK_M=64, PRECISION="tf32x3", SMALL=small)
    assert "BLOCK_M=64" in json.loads(json.dumps(config))
    assert config == KernelConfig(BLOCK_M=64, PRECISION="tf32x3", SMALL=small)
    assert config != KernelConfig(BLOCK_M=64, PRECISION="tf32x3", SMALL=KernelConfig(BLOCK_M=32))
    assert getattr(config.SMALL, "value", config.SMALL).BLOCK_M.value == 16
