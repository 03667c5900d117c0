"""What the CPU gates time: a class of problems, our side of it and the peers.

A row builds its tensors once and gives one function a side: `ours` and the peers. Before anything
is timed, ours is held against float64 by the error budget of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHORT_NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


@dataclass
class Side:
    """One contender: a function to time, and for ours a check (None, or what is wrong)."""

    run: Callable[[], Any]
    check: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Row:
    """A class of problems.

    Attributes:
        gate, goal: ratios of the fastest peer's time to ours.
        flops, bytes: of a call, by the formulas of docs/benchmarks.md; 0 where they say nothing.
        share_gate: the share of the peak of multiply-adds that must hold as well; 0 for none.
        build: makes the sides, by name; one is "ours".
    """

    name: str
    gate: float
    goal: float
    dtype: torch.dtype
    build: Callable[[], dict[str, Side]] = field(repr=False)
    flops: float = 0.0
    bytes: float = 0.0
    share_gate: float = 0.0


def check(compare: Callable[[], None]) -> Callable[[], str | None]:
    """`compare` raises AssertionError if ours is wrong; the check returns its message."""

    def run() -> str | None:
        try:
            compare()
        except AssertionError as error:
            return str(error)
        return None

    return run
