"""`python -m fused_attn`: info, demo and the way to bench."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.suites.cli import main as benchmarks
from fused_attn import attention_backends, demo
from fused_attn.__main__ import main
from fused_attn.ops.operations import OPERATIONS


def test_info_names_every_backend_and_why_it_is_missing(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    operations = [f"{operation.name} backends" for operation in OPERATIONS]
    for name in ("versions", "compiled part", *operations, *attention_backends()):
        assert name in text
    assert torch.__version__ in text


def test_info_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fused_attn", "info"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "attention backends" in done.stdout


def test_bench_says_where_it_went(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "list"]) == 2
    assert "`python -m benchmarks`" in capsys.readouterr().err


def test_benchmarks_list_suites_shapes_and_peers(capsys: pytest.CaptureFixture) -> None:
    assert benchmarks(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("layer_norm", "tokens-16k", "B,H,Hkv,Lq,Lk,D", "flash-attn-3", "sdpa-cudnn"):
        assert name in text


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["fly"])
    shown = capsys.readouterr().err
    assert "info" in shown
    assert "demo" in shown


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo at a size that takes a second, in this process."""
    for name, value in {"WIDTH": 32, "HEADS": 2, "FEED_FORWARD": 64, "CONTEXT": 32}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "_train_apart", demo.train)


def test_demo_trains_compares_and_draws(
    small_demo: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "curves.png"
    assert demo.run(Path(__file__), 8, picture) == 0
    text = capsys.readouterr().out
    assert text.count("curves agree") == 2
    assert "tokens/s" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_notices_curves_that_do_not_agree(
    small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(kind: str, precision: str, text: torch.Tensor, steps: int) -> demo.Result:
        wrong = 0.5 if (kind, precision) == ("fused", "bf16") else 0.0
        noise = {"fp64": 0.0, "fp32": 1e-6, "bf16": 1e-3}[precision]
        return demo.Result([3.0 + wrong + noise] * steps, [0.1] * steps, 1)

    monkeypatch.setattr(demo, "_train_apart", train)
    assert demo.run(Path(__file__), 3, tmp_path / "curves.png") == 1


def test_demo_reads_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 2000)
    (tmp_path / "a.txt").write_text("a" * 1000)
    assert bytes(demo.load_text(tmp_path)[998:1002].tolist()) == b"aabb"


def test_demo_says_what_is_wrong_with_a_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert main(["demo", "--text", str(short)]) == 2
    assert "must hold at least" in capsys.readouterr().out
    assert main(["demo", "--text", str(tmp_path / "nothing")]) == 2
    assert "found nothing at" in capsys.readouterr().out
    assert main(["demo", "--steps", "0"]) == 2
    assert "`--steps` must be at least 1" in capsys.readouterr().err
