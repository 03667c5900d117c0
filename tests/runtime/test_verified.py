"""Records of what passed on a kind of GPU: read as data, and never a crash or a wrong default."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fused_attn.ops import dispatch
from fused_attn.ops.attention import BACKENDS, call, cuda
from fused_attn.ops.attention.problem import AttentionProblem
from fused_attn.ops.attention.triton import backend as triton_backend
from fused_attn.runtime import cuda as cuda_runtime
from fused_attn.runtime import native, verified
from fused_attn.runtime.triton import device as triton_device

HERE = {
    "build": "b1", "capability": "9.0", "driver": "13", "torch": "2.11", "triton": "3.6.0",
}  # fmt: skip
KEYS = {
    f"attention {backend} bfloat16 {size}" for backend in ("cuda", "triton") for size in (64, 128)
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU that every kernel could run on, and a cache folder of its own."""
    monkeypatch.setattr(verified, "machine", lambda index: HERE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_runtime, "emulated", lambda: False)
    monkeypatch.setattr(cuda_runtime, "why_not", lambda device, **how: [])
    monkeypatch.setattr(triton_device, "interpreted", lambda: False)
    monkeypatch.setattr(triton_backend, "why_not", lambda problem: [])
    verified._why_not.cache_clear()
    yield verified.user_folder()
    verified._why_not.cache_clear()


def problem(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> AttentionProblem:
    q = torch.zeros(1, 2, 8, head_dim, dtype=dtype)
    made = call.problem_of(call.Operands(q, q, q), call.Scalars())
    return dataclasses.replace(made, device=torch.device("cuda:0"))


def chosen(*what: object) -> str | None:
    return dispatch.explain(BACKENDS, problem(*what)).chosen  # type: ignore[arg-type]


def test_without_records_torchs_kernels_serve(gpu: Path) -> None:
    told = dispatch.explain(BACKENDS, problem())
    assert told.chosen == "sdpa"
    assert (
        "cuda       runs only when it is asked for by name (not verified on this GPU: run"
        in str(told)
    )
    assert "`python -m fused_attn selftest`" in str(told)
    assert dispatch.select(BACKENDS, problem()).NAME == "sdpa"
    for name in ("cuda", "triton"):  # by name they run
        assert dispatch.select(BACKENDS, problem(), name).NAME == name


def test_what_passed_serves(gpu: Path) -> None:
    assert verified.write(HERE, KEYS) is not None
    assert [chosen(64), chosen(65), chosen(128), chosen(129)] == ["cuda", "cuda", "cuda", "sdpa"]
    assert chosen(64, torch.float16) == "sdpa"


def test_the_first_that_passed_serves(gpu: Path) -> None:
    verified.write(HERE, {key for key in KEYS if "triton" in key})
    assert chosen(64) == "triton"


@pytest.mark.parametrize("field", HERE)
def test_a_record_of_another_build_or_machine_says_nothing(gpu: Path, field: str) -> None:
    verified.write({**HERE, field: "other"}, KEYS)
    assert chosen(64) == "sdpa"


BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "another format": json.dumps({"format": 99, "machine": HERE, "passed": sorted(KEYS)}),
    "no list": json.dumps({"format": 1, "machine": HERE, "passed": "all"}),
    "numbers": json.dumps({"format": 1, "machine": HERE, "passed": [1, 2]}),
    "no machine": json.dumps({"format": 1, "passed": sorted(KEYS)}),
    "code": "__import__('os').system('exit 1')",
    "deep": "[" * 100_000,
    "huge": "[" + "0," * (1 << 20) + "0]",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_file_is_ignored(gpu: Path, name: str) -> None:
    gpu.mkdir(parents=True)
    (gpu / "x.json").write_bytes(BROKEN[name].encode("utf-8", "surrogateescape"))
    if name == "no machine":
        assert chosen(64) == "sdpa"
        return
    with pytest.warns(UserWarning, match=r"x\.json is ignored"):
        assert chosen(64) == "sdpa"


def test_a_broken_file_does_not_hide_a_good_one(gpu: Path) -> None:
    verified.write(HERE, KEYS)
    (gpu / "a.json").write_text("{")
    with pytest.warns(UserWarning, match=r"a\.json is ignored"):
        assert chosen(64) == "cuda"


def test_a_folder_that_cannot_be_written_is_a_warning(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the place of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the record cannot be kept"):
        assert verified.write(HERE, KEYS) is None
    assert chosen(64) == "sdpa"


def test_the_environment_switches_on_what_no_record_knows(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "cuda")
    assert chosen(64) == "cuda"
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "-sdpa")
    assert chosen(64) == "reference"


def test_the_digest_of_the_build_is_stable_and_names_the_kernels() -> None:
    assert verified.build() == verified.build()
    assert len(verified.build()) == 16
    if native.why_not() is None:
        assert any(verified.PACKAGE.glob("_C*"))


def test_a_cpu_needs_no_record() -> None:
    assert verified.why_not("attention", "cuda", torch.device("cpu"), torch.float16, 64) is None
    assert cuda.NAME == "cuda"
