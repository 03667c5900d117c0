"""What the package is made of and asks for: licences, no pickle, no network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cases.fresh_process import run

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
NOTICES = (ROOT / "THIRD_PARTY.md").read_text()
OURS = [
    path
    for folder in ("fused_attn", "csrc", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cmake")
]


def test_the_build_takes_in_no_code_but_what_the_notices_name() -> None:
    """Headers end up in the compiled part: the licence of others' must be in a wheel."""
    included = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            included |= set(re.findall(r"^#include <([\w/.]+)>", path.read_text(), re.M))
    others = {name.partition("/")[0] for name in included if "/" in name}
    assert others == {"pybind11", "sys"}  # sys: the system's own, as in <sys/syscall.h>
    assert "## pybind11" in NOTICES
    assert "Copyright (c) 2016 Wenzel Jakob" in NOTICES
    assert re.search(r'^license-files = \["LICENSE", "THIRD_PARTY.md"\]$', PYPROJECT, re.M)


def test_no_file_of_ours_is_somebody_elses() -> None:
    for path in OURS:
        found = re.search(r"SPDX-License|Copyright|All rights reserved|Licensed under",
                          path.read_text())  # fmt: skip
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"


def test_nothing_is_unpickled_that_a_user_might_have_been_given() -> None:
    for path in OURS:
        if path.suffix != ".py":
            continue
        text = path.read_text()
        assert not re.search(r"\b(?:import|from) (?:pickle|marshal|shelve|dill|joblib)\b", text), (
            path
        )
        assert "allow_pickle=True" not in text, path
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, f"{path}: {call}"


NO_NETWORK = """
import sys

def forbid(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(forbid)
import torch
import fused_attn
from fused_attn.runtime import verified
layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, batch_first=True)
x = torch.randn(2, 5, 16, requires_grad=True)
layer(x).sum().backward()
fused_attn.fuse(torch.nn.TransformerEncoderLayer(16, 2, 32))
print(fused_attn.explain(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)))
from fused_attn import __main__
"""


def test_nothing_is_asked_of_a_network_at_import_or_in_a_call() -> None:
    assert "attention" in run(NO_NETWORK, HOME="/nowhere")


@pytest.mark.parametrize("word", ["requests", "urllib", "http", "socket"])
def test_no_module_imports_what_reaches_a_network(word: str) -> None:
    for path in (ROOT / "fused_attn").rglob("*.py"):
        found = re.search(rf"^\s*(?:import|from) {word}\b", path.read_text(), re.M)
        assert found is None, path
