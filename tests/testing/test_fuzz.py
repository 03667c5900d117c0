"""The fuzzer: it finds nothing in what is right, and what is planted it finds, shrinks, repeats."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.runtime import native
from fused_attn.testing import __main__ as command
from fused_attn.testing import fuzz
from fused_attn.testing.fuzz import fields, run, tensors
from fused_attn.testing.fuzz.built import Built

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason="no compiled part"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("op", fuzz.OPERATIONS)
def test_random_calls(op: str, pytestconfig: pytest.Config) -> None:
    cases = pytestconfig.getoption("fuzz") // (4 if op == run.MODULES else 1)
    backend = run.FUSED if op == run.MODULES else "cpu"
    tried, refused, found = fuzz.fuzz(op, backend, cases, seed=20_000)
    assert found == [], "\n".join(f"{each.message}\n{each.repeat}" for each in found)
    assert tried == cases
    assert refused < cases / 2


def test_the_reference_is_right_by_its_own_rule() -> None:
    assert fuzz.fuzz("attention", "reference", 20)[2] == []


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by cpu is off where a window is given and there are more than 4 keys."""
    call = Built.call

    def wrong(self: Built, given: dict[str, Tensor], backend: str | None, **more: Any) -> list[Any]:
        results = call(self, given, backend, **more)
        keys = given["k"].shape[-2 if self.options.get("layout") == "bhld" else 0]
        if backend == "cpu" and self.options["window"] is not None and keys > 4:
            results[0] = results[0] * 1.1
        return results

    monkeypatch.setattr(Built, "call", wrong)


@pytest.mark.usefixtures("planted")
def test_what_is_wrong_is_found_and_made_small(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fuzz", "--op", "attention", "--backend", "cpu", "--cases", "60"]
    assert command.main(arguments) == 1
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("python -m"))
    words = shlex.split(line)
    case = json.loads(words[words.index("--repeat") + 1])
    assert case["window"] is not None
    simple = {name: field.choices[0] for name, field in run.fields_of("attention").items()}
    kept = {name for name in simple if case[name] != simple[name]}
    assert kept <= {"window", "seqlen_q", "seqlen_k", "packed", "layout", "values"}
    assert command.main(words[3:]) == 1
    assert "still wrong: out: error" in capsys.readouterr().out


def test_what_is_mended_is_right_when_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    case = fields.draw(run.fields_of("linear"), 3)
    line = shlex.split(fuzz.repeat_line("linear", "cpu", case))
    assert command.main(line[3:]) == 0
    assert capsys.readouterr().out == "right\n"


def test_a_write_beside_a_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Built.call

    def beside(
        self: Built, given: dict[str, Tensor], backend: str | None, **more: Any
    ) -> list[Any]:
        results = call(self, given, backend, **more)
        if "out" in more:
            out = more["out"]
            out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0.0)
        return results

    monkeypatch.setattr(Built, "call", beside)
    case = {name: field.choices[0] for name, field in run.fields_of("layer_norm").items()}
    with pytest.raises(AssertionError, match="memory beside `out` was written"):
        fuzz.check("layer_norm", "cpu", {**case, "out": True, "seed": 0})


@pytest.mark.parametrize("layout", fields.LAYOUTS)
def test_layouts_keep_the_numbers(layout: str) -> None:
    x = torch.randn(3, 4, 5)
    y = tensors.laid_out(x, layout)
    assert torch.equal(y, x[:1].expand(3, 4, 5) if layout == "expanded" else x)
    assert layout == "contiguous" or not y.is_contiguous()


def test_the_case_of_a_seed_stays_what_it_is() -> None:
    drawn = [fields.draw(run.fields_of(op), 5) for op in fuzz.OPERATIONS]
    assert drawn == [fields.draw(run.fields_of(op), 5) for op in fuzz.OPERATIONS]
    assert all(json.loads(json.dumps(case)) == case for case in drawn)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "x"], "argument --seed: must be a whole number, got 'x'"),
        (["--op", "attentoin"], "invalid choice: 'attentoin'"),
        (["--repeat", "{}"], "--repeat wants --op and --backend"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["fuzz", *arguments])
    assert said in capsys.readouterr().err


def test_lines_of_other_versions_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    case = fields.draw(run.fields_of("linear"), 3)
    line = ["fuzz", "--op", "linear", "--backend", "cpu", "--version", "0.0.1"]
    assert command.main([*line, "--repeat", json.dumps(case)]) == 0
    assert "the case is of version 0.0.1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="written down by another version"):
        command.main([*line, "--repeat", json.dumps({**case, "tiles": 3})])
    with pytest.raises(SystemExit, match="`backend` must be one of"):
        command.main(["fuzz", "--op", "linear", "--backend", "gpu"])
