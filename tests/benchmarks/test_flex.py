"""A row says how long each side took and how far the outputs are apart."""

from __future__ import annotations

import pytest

from benchmarks import flex


def test_a_row_for_each_function(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flex.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(flex.torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(flex, "ROUNDS", 1)
    assert flex.main(["--lengths", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(flex._functions(64))
    for line in lines:
        assert line.startswith("functions=")
        assert float(line.split("apart=")[1].split()[0]) < 1e-4
        assert "compiled_first_s=" in line
        assert "step_ratio=" in line
