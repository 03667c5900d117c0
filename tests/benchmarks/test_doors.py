"""Models of transformers through the door: each row says what was run and how far apart."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks import doors

SMALL = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def test_a_row_for_each_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = doors.Model("LlamaConfig", "LlamaForCausalLM", SMALL, generates=True)
    monkeypatch.setattr(doors, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(doors, "LENGTH", 8)
    monkeypatch.setattr(doors, "NEW", 2)
    monkeypatch.setattr(doors.torch, "set_num_threads", lambda count: None)
    assert doors.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(" eager_ms")[0] for line in lines if line.startswith("model=")]
    works = ("inference", "training", "generate")
    assert found == [f"model=tiny {d} {work}" for d in ("fp32", "bf16") for work in works]
    for line in lines:
        if line.startswith("model="):
            apart = float(line.split("outputs_apart=")[1])
            assert apart < (1e-6 if "fp32" in line else 3e-2)


def test_every_model_is_named_as_transformers_names_it() -> None:
    import transformers

    for which in doors.MODELS.values():
        assert hasattr(transformers, which.config)
        assert hasattr(transformers, which.model)
