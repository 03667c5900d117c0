"""`python -m fused_attn`: info, demo and the way to bench."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.suites.cli import main as benchmarks
from fused_attn import attention_backends, demo, demo_model
from fused_attn.__main__ import main
from fused_attn.ops.operations import OPERATIONS
from fused_attn.runtime import native


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
    who = text.partition("\nours, on ")[2]
    told = dict(re.findall(r"^  (\S+) +((?:not )?here.*)$", who, re.M))
    assert told["cpu"].startswith("here (" if native.why_not() is None else "not here: ")
    assert told["sdpa-math"].startswith("here (attention")
    if not torch.cuda.is_available():  # it is installed, and can run nothing here
        assert told["sdpa-cudnn"] == "not here: needs an NVIDIA GPU"


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
        monkeypatch.setattr(demo_model, name, value)
    monkeypatch.setattr(demo, "_apart", lambda function, *arguments: function(*arguments))


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
    pretended = PretendedMachine(monkeypatch, dict.fromkeys(demo.CURVES, 0.1))
    pretended.wrong = ("fused", "bf16")
    assert demo.run(Path(__file__), 3, tmp_path / "curves.png") == 1


class PretendedMachine:
    """A clock, and what a step of each curve takes by it; curves are as far off as they may be.

    Attributes:
        later: what a step takes when a curve is trained, if other than when it was timed.
        start_up: seconds to start a process.
        wrong: a curve that is off by half a nat.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: dict[demo.Curve, float]) -> None:
        self.now, self.start_up, self.step = 1000.0, 6.0, step
        self.later: dict[demo.Curve, float] = {}
        self.wrong: demo.Curve | None = None
        monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(demo, "_apart", self.apart)
        monkeypatch.setattr(demo, "train", self.train)

    def apart(self, function: Callable[..., object], *arguments: object) -> object:
        self.now += self.start_up
        return function(*arguments)

    def train(
        self, curve: demo.Curve, text: torch.Tensor, steps: int, limit: float, quiet: bool = False
    ) -> demo.Result:
        step, seconds = self.step[curve] if quiet else self.later.get(curve, self.step[curve]), []
        while not seconds or (len(seconds) < steps and sum(seconds) + step <= limit):
            seconds.append(step)
        self.now += sum(seconds)
        wrong = 0.5 if curve == self.wrong else 0.0
        noise = {"fp64": 0.0, "fp32": 1e-6, "bf16": 1e-3}[curve[1]]
        return demo.Result([3.0 + wrong + noise] * len(seconds), seconds, 1)


STOCK16, FUSED16 = ("stock", "bf16"), ("fused", "bf16")
# A small machine whose torch takes seconds a step in bfloat16.
SLOW = {
    demo.ORACLE: 0.7, ("stock", "fp32"): 0.45, ("fused", "fp32"): 0.4, STOCK16: 7.4, FUSED16: 7.3
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "later", "left_out", "compared"),
    [
        (SLOW, {}, [STOCK16, FUSED16], 1),
        ({**SLOW, FUSED16: 0.5}, {}, [STOCK16], 1),
        (dict.fromkeys(demo.CURVES, 0.2), {}, [], 2),
        (dict.fromkeys(demo.CURVES, 0.2), {FUSED16: 8.0}, [FUSED16], 1),
        (dict.fromkeys(demo.CURVES, 0.2), {demo.ORACLE: 8.0}, [demo.ORACLE], 0),
        ({c: 2 * s for c, s in SLOW.items()}, {}, [demo.ORACLE, STOCK16, FUSED16], 0),
        (dict.fromkeys(demo.CURVES, 40.0), {}, list(demo.CURVES), 0),
    ],
    ids=[
        "slow bf16", "stock is slow", "fast", "slower than timed", "slow oracle", "slower",
        "hopeless",
    ],
)  # fmt: skip
def test_demo_takes_three_minutes_at_the_most_and_says_what_it_leaves_out(
    step: dict[demo.Curve, float], later: dict[demo.Curve, float], left_out: list[demo.Curve],
    compared: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    pretended = PretendedMachine(monkeypatch, step)
    pretended.later = later
    assert demo.run(Path(__file__), 50, tmp_path / "curves.png") == 0
    assert pretended.now - 1000.0 < 180
    text = capsys.readouterr().out
    said = [line for line in text.splitlines() if line.startswith("left out: ")]
    assert [tuple(line.split()[2:4]) for line in said] == [(k, f"{p},") for k, p in left_out]
    for curve, line in zip(left_out, said, strict=True):
        seconds = later.get(curve, step[curve])
        took = f"a step takes {seconds:.2f} s and 50 of them {50 * seconds / 60:.1f} minutes"
        assert took in line or "took too long to time" in line
    assert text.count("curves agree") == compared
    assert text.count("curves not compared") == 2 - compared


def test_demo_shows_the_speed_of_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    PretendedMachine(monkeypatch, {**SLOW, FUSED16: 0.5})
    assert demo.run(Path(__file__), 50, tmp_path / "curves.png") == 0
    lines = {tuple(line.split()[:2]): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines[STOCK16][2:] == ["left", "out", "277", "1.00"]
    assert lines[FUSED16][3:5] == ["4,096", "14.80"]


def test_demo_takes_fewer_steps_where_there_is_no_time_for_any_curve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretended = PretendedMachine(monkeypatch, {c: 6 * s for c, s in SLOW.items()})
    assert demo.run(Path(__file__), 50, tmp_path / "curves.png") == 0
    assert pretended.now - 1000.0 < 180
    text = capsys.readouterr().out
    assert "11 steps in place of 50" in text
    left_out = [line.split(",")[0] for line in text.splitlines() if line.startswith("left out")]
    assert left_out == ["left out: stock fp64", "left out: stock bf16", "left out: fused bf16"]


def test_demo_holds_more_where_there_is_more_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    PretendedMachine(monkeypatch, SLOW)
    assert demo.run(Path(__file__), 50, tmp_path / "curves.png", minutes=20.0) == 0
    assert "left out" not in capsys.readouterr().out
    assert main(["demo", "--minutes", "0"]) == 2
    assert "`--minutes` must be more than 0" in capsys.readouterr().err


def test_a_curve_ends_where_its_time_does(small_demo: None) -> None:
    text = demo.load_text(Path(__file__))
    assert len(demo.train(demo.ORACLE, text, 3).losses) == 3
    assert len(demo.train(demo.ORACLE, text, 3, limit=0.0).losses) == 1


def test_demo_estimates_its_time_once_steps_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Five processes to start, six seconds each, and fifty steps of a fifth of a second each."""
    pretended = PretendedMachine(monkeypatch, dict.fromkeys(demo.CURVES, 0.2))
    assert demo.run(Path(__file__), 50, tmp_path / "curves.png") == 0
    said = capsys.readouterr().out
    assert "5 curves of 50 steps: about 1.3 minutes from here" in said
    first = said.index("about 1.3 minutes")
    assert first < said.index("curve  ")
    timing = 6.0 + 5 * 2 * 0.2  # a process, and two steps of every curve
    assert abs(pretended.now - 1000.0 - timing - 1.3 * 60) < 0.05 * 60  # as it was rounded


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_demo_takes_a_dtype(
    small_demo: None, tmp_path: Path, capsys: pytest.CaptureFixture, dtype: str
) -> None:
    other = {"fp32": "bf16", "bf16": "fp32"}[dtype]
    picture = tmp_path / "curves.png"
    command = ["demo", "--text", __file__, "--steps", "6", "--dtype", dtype]
    assert main([*command, "--output", str(picture)]) in (0, 1)  # six steps tell little
    text = capsys.readouterr().out
    assert f"stock {dtype}" in text
    assert f"stock {other}" not in text
    assert text.count("off the float64 curve by") == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["demo", "--dtype", "int8"])


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_demo_that_is_interrupted_writes_what_it_has(
    calls: int, small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """In the timing, in the first curve, in the third one: that ends with the step it is at."""
    left = [calls]

    def apart(function: Callable[..., object], *arguments: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            monkeypatch.setattr(demo, "_stop", SimpleNamespace(is_set=lambda: True))
            raise demo.Interrupted(function(*arguments))
        return function(*arguments)

    monkeypatch.setattr(demo, "_apart", apart)
    picture = tmp_path / "curves.png"
    assert demo.run(Path(__file__), 6, picture) == 130
    text = capsys.readouterr().out
    assert "interrupted: this is what there is" in text
    assert picture.exists() == (calls > 1)
    assert ("tokens/s" in text) == (calls > 1)
    assert ("interrupted after different numbers of steps" in text) == (calls == 4)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Interrupts are obeyed: tests in the background of a shell ignore them otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_curve_gives_back_what_it_has_on_ctrl_c() -> None:
    """The process finishes its step, and is not ended by a terminal's Ctrl-C, which it gets too."""
    text = demo.load_text(Path(__file__))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(demo.Interrupted) as caught:
        demo._apart(demo.train, demo.CURVES[1], text, 10_000)
    assert 1 <= len(caught.value.result.losses) < 10_000


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
