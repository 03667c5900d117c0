"""Fixtures that every test file shares."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn.attention import BACKENDS as ATTENTION_BACKENDS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`attention_backend` runs over the operation's BACKENDS: a new one inherits every test."""
    if "attention_backend" in metafunc.fixturenames:
        names = [backend.NAME for backend in ATTENTION_BACKENDS]
        metafunc.parametrize("attention_backend", names, indirect=True)
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("fuzz")))


@pytest.fixture
def attention_backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that can run here; its own reasons are the reasons to skip."""
    x = torch.zeros(1, 1, 1, 1)
    reasons = dict(fused_attn.explain(x, x, x).reasons)[request.param]
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor starts as NaN, so that an unwritten element cannot pass."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and type(tensor) is torch.Tensor and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=200, help="random cases a backend")
