"""What `selftest` measured on this machine decides in place of the shipped figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import info
from fused_attn.ops import dispatch
from fused_attn.ops.explanation import Explanation
from fused_attn.ops.linear import measured
from fused_attn.runtime import native, processor, verified
from fused_attn.selftest import run

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def finding(dtype: str, ratio: float, size: int = 0, variant: str = "") -> list[run.Finding]:
    """A case that passed, and its speed."""
    who = {"operation": "linear", "backend": "cpu", "variant": variant, "size": size}
    told = {**who, "dtype": dtype, "case": "x"}
    return [{**told, "status": "passed"}, {**told, "status": "timed", "ratio": ratio}]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of this processor: ours is faster in float32, torch's in bfloat16, float16 is near."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verified, "speed_here", verified._speed_here)
    monkeypatch.setattr(processor, "vendor", lambda: "amd")
    monkeypatch.setattr(processor, "has", lambda *features: False)
    verified.forget()
    told = [*finding("float32", 1.4), *finding("bfloat16", 0.5), *finding("float16", 0.95),
            *finding("float32", 0.7, 64), *finding("float32", 0.2, variant="portable")]  # fmt: skip
    path = run.record(told, "cpu")
    assert path.is_relative_to(tmp_path)
    dispatch.forget_plans()
    yield
    verified.forget()
    dispatch.forget_plans()


def told(dtype: str, rows: int) -> Explanation:
    x, weight = torch.randn(rows, 64).to(DTYPES[dtype]), torch.randn(64, 64).to(DTYPES[dtype])
    return fused_attn.explain(fused_attn.linear, x, weight)


def test_the_record_decides(record: None) -> None:
    assert told("float32", 100).chosen == "cpu"
    assert "measured by selftest: bfloat16 0.50 x torch" in str(told("float32", 100))
    assert "0.70 of its speed" in str(told("float32", 64))
    assert told("float32", 64).chosen == "torch"
    assert told("bfloat16", 100).chosen == "torch"
    assert told("bfloat16", 64).chosen == "cpu"  # nothing was measured: the shipped figures
    assert told("float16", 100).chosen == "cpu"  # too near to say
    assert not measured.is_never_ours(torch.randn(3))
    assert "float32 1.40 x torch" in info.report() or torch.cuda.is_available()


def test_a_record_of_another_machine_says_nothing(
    record: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "name", lambda: "another")
    verified.forget()
    assert told("float32", 100).chosen == "torch"
    assert measured.is_never_ours(torch.randn(3))
    assert measured.how() == "by shipped figures"


def test_the_processor_has_a_name() -> None:
    assert processor.name()
