"""Records of what passed on a kind of GPU: read as data, and never a crash or a wrong default."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from fused_attn import info
from fused_attn.ops import dispatch
from fused_attn.ops.attention import BACKENDS, call, cuda
from fused_attn.ops.attention.problem import AttentionProblem
from fused_attn.ops.attention.triton import backend as triton_backend
from fused_attn.ops.bias_activation.triton import backend as activation_triton
from fused_attn.ops.layer_norm.triton import backend as norm_triton
from fused_attn.ops.operations import OPERATIONS, Operation
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
    for backend in (triton_backend, norm_triton, activation_triton):
        monkeypatch.setattr(backend, "why_not", lambda problem: [])
    monkeypatch.setattr(verified, "_warned", True)
    verified.forget()
    yield verified.user_folder()
    verified.forget()


def write(
    keys: set[str] = KEYS, here: dict[str, str] = HERE, speed: dict[str, float] | None = None
) -> Path | None:
    return verified.write(here, verified.Record(frozenset(keys), speed or {}))


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
    assert write() is not None
    assert [chosen(64), chosen(65), chosen(128), chosen(129)] == ["cuda", "cuda", "cuda", "sdpa"]
    assert chosen(64, torch.float16) == "sdpa"


def test_the_first_that_passed_serves(gpu: Path) -> None:
    write({key for key in KEYS if "triton" in key})
    assert chosen(64) == "triton"


@pytest.mark.parametrize("field", HERE)
def test_a_record_of_another_build_or_machine_says_nothing(gpu: Path, field: str) -> None:
    write(KEYS, {**HERE, field: "other"})
    assert chosen(64) == "sdpa"


def content(**changed: object) -> str:
    right = {"format": 2, "machine": HERE, "passed": sorted(KEYS), "speed": {}}
    return json.dumps(right | changed)


KEY = "attention cuda bfloat16 64"
BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "another format": content(format=99),
    "an old one": json.dumps({"format": 1, "machine": HERE, "passed": sorted(KEYS)}),
    "no list": content(passed="all"),
    "numbers": content(passed=[1, 2]),
    "no machine": json.dumps({"format": 2, "passed": sorted(KEYS), "speed": {}}),
    "no speed": content(speed=None),
    "speed of nothing": content(speed={"attention cuda bfloat16 512": 2.0}),
    "speed as text": content(speed={KEY: "fast"}),
    "speed as bool": content(speed={KEY: True}),
    "no speed at all": content(speed={KEY: 0.0}),
    "negative": content(speed={KEY: -1.0}),
    "infinite": content(speed={KEY: float("inf")}),
    "no number": content(speed={KEY: float("nan")}),
    "too many digits": content(speed={KEY: 10**400}),
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
    write()
    (gpu / "a.json").write_text("{")
    with pytest.warns(UserWarning, match=r"a\.json is ignored"):
        assert chosen(64) == "cuda"


def test_a_folder_that_cannot_be_written_is_a_warning(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the place of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the record cannot be kept"):
        assert write() is None
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
    for ask in (verified.why_not, verified.slower):
        assert ask("attention", "cuda", torch.device("cpu"), torch.float16, 64) is None
    assert cuda.NAME == "cuda"


def test_where_torch_was_faster_torch_serves(gpu: Path) -> None:
    write(speed={KEY: 0.8, "attention cuda bfloat16 128": 1.3, "attention triton bfloat16 64": 0.9})
    told = dispatch.explain(BACKENDS, problem(64))
    assert told.chosen == "sdpa"
    assert "torch's own was faster here in `selftest`: 0.80 of its speed" in str(told)
    assert dispatch.select(BACKENDS, problem(64)).NAME == "sdpa"
    assert dispatch.select(BACKENDS, problem(64), "cuda").NAME == "cuda"  # by name it runs
    assert chosen(128) == "cuda"


def test_what_torch_cannot_express_stays_with_the_slower_kernel(gpu: Path) -> None:
    """Not with the formula, which is slower still."""
    write(speed={KEY: 0.8, "attention triton bfloat16 64": 0.8})
    with_lse = dataclasses.replace(problem(64), return_lse=True)
    assert dispatch.explain(BACKENDS, with_lse).chosen == "cuda"


def test_where_torchs_own_is_switched_off_the_slower_kernel_serves(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(speed={KEY: 0.8})
    monkeypatch.setenv("FUSED_ATTN_BACKENDS", "-sdpa")
    assert chosen(64) == "cuda"


def test_the_users_word_on_speed_is_the_last(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verified, "SHIPPED", tmp_path / "shipped")
    verified.write(HERE, verified.Record(frozenset(KEYS), {KEY: 0.5}), tmp_path / "shipped")
    assert chosen(64) != "cuda"
    write(speed={KEY: 1.5})
    assert chosen(64) == "cuda"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_without_records_every_operation_is_torchs(gpu: Path, operation: Operation) -> None:
    """Not the formula's: a GPU's user is never worse off."""
    smallest = operation.smallest(torch.device("cpu"), torch.bfloat16)
    on_gpu = dataclasses.replace(smallest, device=torch.device("cuda:0"))
    told = dispatch.explain(operation.backends, on_gpu)
    chosen = dispatch.find(operation.backends, told.chosen or "")
    assert dispatch.is_torchs(chosen), str(told)


def test_the_first_call_that_is_not_verified_warns_and_no_other(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.explain(BACKENDS, problem())  # to ask is no call
        dispatch.select(BACKENDS, problem(), "cuda")  # nor is it a surprise by name
    with pytest.warns(UserWarning, match=r"not been verified on this GPU.*selftest"):
        dispatch.select(BACKENDS, problem())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (64, 128, 256):
            dispatch.select(BACKENDS, problem(size))


def test_a_verified_call_warns_of_nothing(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_warned", False)
    write(speed={KEY: 0.5})  # nor does one that is left to torch because it is faster
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.select(BACKENDS, problem(64))
        dispatch.select(BACKENDS, problem(128))


def reported(monkeypatch: pytest.MonkeyPatch) -> str:
    """What `info` says on that GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("device_count", 1), ("get_device_name", "Stub")):
        monkeypatch.setattr(torch.cuda, name, lambda *index, v=value: v)
    on_cpu = [operation.smallest(torch.device("cpu"), torch.float32) for operation in OPERATIONS]
    shown = [
        dataclasses.replace(
            operation, smallest=lambda device, dtype, p=p: dataclasses.replace(p, device=device)
        )
        for operation, p in zip(OPERATIONS, on_cpu, strict=True)
    ]
    monkeypatch.setattr(info, "OPERATIONS", shown)
    return info.report()


def test_info_without_records(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = reported(monkeypatch)
    assert re.search(r"^  verified +nothing: run", text, re.M)
    assert (
        "available by name (not verified on this GPU: run `python -m fused_attn selftest`" in text
    )
    assert "build       b1" in text
    assert "of other builds" not in text


def test_info_with_a_record(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(speed={KEY: 0.8, "attention triton bfloat16 128": 2.0})
    text = reported(monkeypatch)
    assert ", ".join(sorted(KEYS)) in text
    assert f"torch is faster at  {KEY} (0.80)\n" in text


def test_info_with_a_record_of_another_build(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(KEYS, {**HERE, "build": "other"})
    text = reported(monkeypatch)
    assert f"of other builds  {path}" in text
    assert "nothing: run" in text


def test_explain_with_a_record_of_another_build(gpu: Path) -> None:
    write(KEYS, {**HERE, "build": "other"})
    told = dispatch.explain(BACKENDS, problem())
    assert told.chosen == "sdpa"
    assert "not verified on this GPU" in str(told)


def test_info_on_a_cpu_needs_no_record() -> None:
    assert "by shipped figures" in info.report() or torch.cuda.is_available()


@pytest.mark.parametrize("verified_here", [False, True])
def test_the_compiler_traces_no_record(gpu: Path, verified_here: bool) -> None:
    """A whole graph of a call on a GPU asks the records, which are files."""
    if verified_here:
        write(speed={KEY: 0.5})
    device = torch.device("cuda:0")

    def run(x: torch.Tensor) -> torch.Tensor:
        what = ("attention", "cuda", device, torch.bfloat16, 64)
        return x + (verified.why_not(*what) is None) + 2 * (verified.slower(*what) is not None)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)).item() == (3.0 if verified_here else 0.0)
