"""Whole models beside stock: each row says what was run and how far the outputs are apart."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks import models


def test_a_row_for_each_dtype_and_direction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    monkeypatch.setattr(models, "MODELS", {"tiny": (tiny, 16)})
    monkeypatch.setattr(models.torch, "set_num_threads", lambda count: None)
    assert models.main(["--only", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model=tiny"] * 4
    for line in lines:
        apart = float(line.split("outputs_apart=")[1])
        assert apart < (1e-6 if "float32" in line else 3e-2)
