"""Options of `pytest benchmarks`: those of `python -m benchmarks`."""

from __future__ import annotations

import pytest
import torch

from .suites.problem import DTYPES
from .suites.suites import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_attn benchmarks")
    group.addoption(
        "--suites",
        nargs="+",
        choices=[suite.name for suite in SUITES],
        default=[suite.name for suite in SUITES],
        help="default all",
    )
    group.addoption(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    group.addoption("--dtype", nargs="+", choices=list(DTYPES), default=[])
    group.addoption("--shapes", nargs="+", default=[], help="default the quick ones")
