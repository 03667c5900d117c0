"""Errors against float64: what is measured, recorded, and written to the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import numerics
from fused_attn.runtime import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")


def test_errors_are_measured_recorded_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = numerics.attention(16, 8, True)
    monkeypatch.setattr(numerics, "cases", lambda: [small])
    monkeypatch.setattr(numerics, "RESULTS", tmp_path)
    monkeypatch.setattr(numerics, "PICTURE", tmp_path / "numerics.png")
    page = tmp_path / "numerics.md"
    page.write_text(f"before\n{numerics.MARKS[0]}\nold\n{numerics.MARKS[1]}\nafter\n")
    monkeypatch.setattr(numerics, "PAGE", page)
    assert numerics.main(["--here", "--save"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * len(numerics.DTYPES)
    for line in lines:
        *_, ours, theirs, ratio = line.split()
        assert 0 < float(ours) < 0.02
        assert abs(float(ours) / float(theirs) - float(ratio)) < 0.01 + float(ratio) / 50
    assert numerics.main(["--page"]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| attention causal L 16 D 8 |" in text
    assert (tmp_path / "numerics.png").stat().st_size > 1000


def test_a_page_without_records_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(numerics, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="nothing is recorded"):
        numerics.main(["--page"])
