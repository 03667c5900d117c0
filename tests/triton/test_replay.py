"""Repeated calls launch what they launched before, with their own tensors, or run as ever.

Tests run Triton in its interpreter, which launches nothing: these go to a process of their own, in
which a GPU that is not there notes what reaches its driver.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import fake_gpu

if fake_gpu.why_not_installed() is not None:
    pytest.skip(str(fake_gpu.why_not_installed()), allow_module_level=True)

ROOT = Path(__file__).parents[2]


@functools.cache
def told(module: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cases.{module}"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_driver_gets_the_same_argument_for_argument() -> None:
    """Over all operations, with tensors seen before and with new ones."""
    first, second = told("replayed_launches")
    assert len(first) > 50
    for calls in (first, second):
        assert {
            name: call["differences"] for name, call in calls.items() if call["differences"]
        } == {}
        assert [name for name, call in calls.items() if call["launches"] == 0] == []


def test_calls_are_repeated_from_the_third_on() -> None:
    first, second = told("replayed_launches")
    # Some calls here are equal to others before them, up to where their tensors are.
    assert [name for name, call in first.items() if call["repeated"] < 2] == []
    assert [name for name, call in second.items() if call["repeated"] < 4] == []


RULES = (
    "launch_hooks_see_every_launch",
    "hooks_of_a_kernel_see_its_tensors",
    "debugging_compiles_other_kernels",
    "trials_and_their_end_start_anew",
    "a_tile_that_has_just_been_chosen_is_not_noted",
    "an_unknown_triton_is_left_alone",
    "compiling_without_launching_launches_nothing",
    "notes_keep_no_tensor",
    "streams_devices_and_drivers_are_those_of_the_call",
    "a_setting_of_torch_is_another_call",
    "what_cannot_be_told_is_never_repeated",
    "operators_between_are_repeated",
    "layouts_tell_calls_apart_with_and_without_compiled_code",
    "a_repeated_launch_asks_the_driver_nothing_else",
    "tapes_are_bounded",
)


@pytest.mark.parametrize("name", RULES)
def test_when_a_call_is_repeated(name: str) -> None:
    assert told("replay_rules")[name] == ""


def test_every_rule_is_looked_at() -> None:
    assert set(told("replay_rules")) == set(RULES)
