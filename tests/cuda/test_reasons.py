"""Why CUDA kernels cannot run: each reason, on machines that are made up; and failed launches."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_attn
from fused_attn import info
from fused_attn.ops import dispatch
from fused_attn.ops.attention import call, cuda
from fused_attn.ops.attention.problem import AttentionProblem, Operands
from fused_attn.ops.layer_norm import cuda as norm_cuda
from fused_attn.runtime import cuda as cuda_runtime
from fused_attn.runtime import native

ROOT = Path(__file__).parents[2]
BUILD = {"cuda": True, "cuda_archs": "80 90a", "cuda_missing": ""}


def problem(dtype: torch.dtype = torch.float16, head_dim: int = 64) -> AttentionProblem:
    x = torch.zeros(1, 1, 1, head_dim, dtype=dtype)
    found = call.problem_of(Operands(x, x, x), call.Scalars())
    return dataclasses.replace(found, device=torch.device("cuda", 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Makes up a GPU, its driver, and how `_C` was built."""

    def make(capability=(9, 0), versions=(13000, 13010), **build: object) -> None:
        module = SimpleNamespace(
            build_info=lambda: {**BUILD, **build},
            cuda_versions=lambda: versions,
            cpu_level=lambda: "portable",
            available_cpu_levels=lambda: ["portable"],
            cpu_level_left_out=lambda: "",
        )
        monkeypatch.setattr(cuda_runtime, "emulated", lambda: False)
        monkeypatch.setattr(native, "why_not", lambda: None)
        monkeypatch.setattr(native, "module", lambda: module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return make


def test_a_hopper_with_everything_in_place_has_no_reason(machine) -> None:
    machine()
    assert cuda.why_not(problem()) == []
    # Drivers serve all runtimes of their own major version.
    machine(versions=(13010, 13000))
    assert cuda.why_not(problem()) == []


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"cuda": False, "cuda_missing": "no CUDA compiler (nvcc) was found"},
         "fused_attn._C was built without CUDA: no CUDA compiler (nvcc) was found"),
        ({"cuda": False, "cuda_missing": "nvcc 11.8 is older than 12.3"},
         "fused_attn._C was built without CUDA: nvcc 11.8 is older than 12.3"),
        ({"versions": (13000, 12040)}, "needs a driver for CUDA 13.0 or later, which "
         "fused_attn._C was built with; this one is for 12.4"),
        ({"versions": (13000, 0)}, "needs a driver for CUDA 13.0 or later, which "
         "fused_attn._C was built with; this one is for none"),
        ({"capability": (8, 0)}, "needs compute capability 9.0, cuda:0 has 8.0"),
        ({"capability": (10, 0)}, "needs compute capability 9.0, cuda:0 has 10.0"),
        ({"cuda_archs": "80"}, "fused_attn._C was built for 80 (FUSED_ATTN_CUDA_ARCHS), cuda:0 "
         "has compute capability 9.0"),
    ],
)  # fmt: skip
def test_each_reason_is_told(machine, setting: dict, reason: str) -> None:
    machine(**setting)
    explanation = dispatch.explain((cuda,), problem())
    assert explanation.reasons == (("cuda", (reason,)),)
    assert reason in str(explanation)
    with pytest.raises(fused_attn.UnsupportedError, match="no backend can run") as caught:
        dispatch.select((cuda,), problem())
    assert reason in str(caught.value)


def test_shapes_and_dtypes_outside_the_limits_are_told(machine) -> None:
    machine()
    assert cuda.why_not(problem(head_dim=264)) == [
        "serves head sizes up to 256, got head_dim=264",
        "serves head sizes up to 256, got head_dim_v=264",
    ]
    assert cuda.why_not(problem(torch.float32)) == ["has no kernels for torch.float32"]


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), "80 90a", True),
        ((8, 9), "80 90a", True),
        ((9, 0), "80 90a", True),
        ((9, 0), "80", False),  # machine code serves its own major version
        ((10, 0), "80 90a", False),
        ((12, 0), "80 90a 120", True),
        ((8, 0), "86", False),
    ],
)
def test_the_norms_run_where_there_is_code_for_them(machine, capability, archs, runs) -> None:
    machine(capability, cuda_archs=archs)
    reasons = cuda_runtime.why_not(torch.device("cuda", 0), at_least=norm_cuda._OLDEST)
    assert (reasons == []) == runs, reasons


def test_this_build_left_nothing_out_because_it_failed() -> None:
    """`auto` builds without CUDA rather than not at all; it should not come to that here."""
    if (missing := native.why_not()) is not None:
        pytest.skip(missing)
    assert "failed" not in native.module().build_info()["cuda_missing"]


def test_info_says_what_the_build_lacks(machine) -> None:
    machine(cuda=False, cuda_missing="nvcc 11.8 is older than 12.3")
    assert "nvcc 11.8 is older than 12.3" in info._native()


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", ""),
        ("Cuda compilation tools, release 12.3, V12.3.52", ""),
        ("Cuda compilation tools, release 11.8, V11.8.89", "nvcc 11.8 is older than 12.3"),
        ("hello", "does not say which release"),
        (None, "no CUDA compiler (nvcc) was found"),
    ],
)
def test_the_build_asks_nvcc_for_its_release(
    tmp_path: Path, says: str | None, problem: str
) -> None:
    compiler = tmp_path / "nvcc"
    if says is not None:
        compiler.write_text(f"#!/bin/sh\necho '{says}'\n")
        compiler.chmod(0o755)
    script = tmp_path / "ask.cmake"
    script.write_text(
        f'include("{ROOT}/csrc/cuda/cuda.cmake")\n'
        f'fused_attn_nvcc_problem("{compiler if says is not None else ""}" problem)\n'
        'message("<${problem}>")\n'
    )
    result = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True)
    said = result.stderr.strip()
    assert result.returncode == 0, said
    assert said == "<>" if problem == "" else problem in said


emulated = pytest.mark.skipif(
    not cuda_runtime.emulated(), reason="the emulator is not built (make test builds it)"
)


@emulated
def test_a_failed_launch_says_what_failed_and_the_next_call_works() -> None:
    q = torch.randn(1, 2, 5, 8).half().requires_grad_()
    expected = fused_attn.attention(q, q, q, backend="cuda")
    fail = functools.partial(cuda_runtime.module().fail_next_call, "cudaLaunchKernelExC")
    fail(9, "cudaErrorInvalidConfiguration")
    with pytest.raises(RuntimeError) as caught:
        fused_attn.attention(q, q, q, backend="cuda")
    message = str(caught.value)
    assert message.startswith("attention_forward failed: cudaErrorInvalidConfiguration")
    assert "in attention on cpu, torch.float16: batch=1, num_heads=2" in message
    out = fused_attn.attention(q, q, q, backend="cuda")
    assert torch.equal(out, expected)
    fail(2, "cudaErrorMemoryAllocation")
    with pytest.raises(RuntimeError, match=r"attention_backward .*cudaErrorMemoryAllocation"):
        out.float().sum().backward(retain_graph=True)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@emulated
def test_a_failed_norm_says_so_too() -> None:
    x = torch.randn(3, 8).half()
    cuda_runtime.module().fail_next_call("cudaLaunchKernelExC", 9, "cudaErrorInvalidConfiguration")
    with pytest.raises(RuntimeError, match=r"cudaErrorInvalidConfiguration[\s\S]*in layer_norm on"):
        fused_attn.layer_norm(x, (8,), backend="cuda")
    assert fused_attn.layer_norm(x, (8,), backend="cuda").isfinite().all()


@emulated
@pytest.mark.parametrize(
    ("code", "name", "lost"),
    [
        (9, "cudaErrorInvalidConfiguration", False),
        (209, "cudaErrorNoKernelImageForDevice", False),
        (700, "cudaErrorIllegalAddress", True),
        (719, "cudaErrorLaunchFailure", True),
    ],
)
def test_errors_that_cost_the_context_are_told_apart(code: int, name: str, lost: bool) -> None:
    x = torch.randn(1, 1, 4, 8).half()
    cuda_runtime.module().fail_next_call("cudaLaunchKernelExC", code, name)
    with pytest.raises(RuntimeError, match=name) as caught:
        fused_attn.attention(x, x, x, backend="cuda")
    assert ("CUDA_LAUNCH_BLOCKING=1" in str(caught.value)) == lost
