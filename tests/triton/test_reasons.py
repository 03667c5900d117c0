"""What the Triton backends cannot do is a reason, on any device: properties are injected."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import attention
from fused_attn.ops.attention import call
from fused_attn.ops.attention.call import Scalars
from fused_attn.ops.attention.problem import Operands
from fused_attn.ops.attention.triton import backend
from fused_attn.runtime.triton import device as triton_device
from tests.cases.fresh_process import run

pytest.importorskip("triton", reason="Triton is not installed")

KIB = 1 << 10


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the GPU that stands in for "cuda:0" is."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton_device, "_device_multiprocessors", lambda index: 132)

    def set_properties(arch: int, shared_memory: int, hip: str | None = None) -> None:
        monkeypatch.setattr(triton_device, "_device_arch", lambda index: arch)
        monkeypatch.setattr(triton_device, "_device_shared_memory", lambda index: shared_memory)
        monkeypatch.setattr(torch.version, "hip", hip)

    return set_properties


def reasons(
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    requires_grad: bool = False,
    seqlen_q: int = 128,
    weights: str | None = None,
) -> list[str]:
    """Why not a call on "cuda:0"."""
    q = torch.zeros(1, 2, seqlen_q, head_dim, dtype=dtype)
    k = torch.zeros(1, 2, 4096, head_dim, dtype=dtype)
    operands = Operands(q, k, k, torch.zeros(1, 1, seqlen_q, 1, dtype=dtype) if bias else None)
    problem = call.problem_of(operands, Scalars(return_weights=weights))
    device = torch.device("cuda:0")
    return backend.why_not(
        dataclasses.replace(problem, device=device, gradients=("q",) if requires_grad else ())
    )


def test_limits_are_reasons() -> None:
    q = torch.randn(1, 1, 2, 300)
    with pytest.raises(fused_attn.UnsupportedError, match="head_dim=300"):
        attention(q, q, q, backend="triton")
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(fused_attn.UnsupportedError, match="float64"):
        attention(x, x, x, backend="triton")


@pytest.mark.parametrize(
    ("arch", "shared_memory"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_every_call_fits_on_what_is_served(device: Any, arch: int, shared_memory: int) -> None:
    device(arch, shared_memory * KIB)
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (1, 64, 65, 128, 256):
            assert reasons(head_dim, dtype) == []
            assert reasons(head_dim, dtype, True, True, weights="average") == []
            assert reasons(head_dim, dtype, seqlen_q=1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_old_gpu_is_a_reason(device: Any, dtype: torch.dtype) -> None:
    """Below 8.0 there is no bfloat16 either; the capability says it for all dtypes."""
    device(75, 64 * KIB)
    [reason] = reasons(dtype=dtype)
    assert reason == "needs compute capability 8.0 or later, cuda:0 has 7.5"


def test_too_little_shared_memory_is_a_reason_of_the_kernels_that_a_call_runs(device: Any) -> None:
    device(80, 48 * KIB)
    [forward] = reasons(256)
    assert "the forward kernel needs" in forward
    assert f"this device has {48 * KIB}" in forward
    assert [x.split()[1] for x in reasons(256, requires_grad=True)] == ["forward", "dkdv", "dq"]
    device(80, 32 * KIB)
    assert reasons(64, seqlen_q=1) == []
    assert "the decode kernel needs" in reasons(256, seqlen_q=1)[0]
    device(80, 4 * KIB)
    kernels = [x.split()[1] for x in reasons(64, torch.float32, True, True, weights="per_head")]
    assert kernels == ["forward", "dkdv", "dq", "bias", "weights"]


def test_amd_has_less_shared_memory_and_no_tf32(device: Any) -> None:
    from fused_attn.ops.attention.triton.launcher import precision

    device(0, 64 * KIB, hip="6.4")
    for head_dim in (64, 128, 256):
        assert reasons(head_dim, requires_grad=True) == []
    device(0, 8 * KIB, hip="6.4")
    assert "this device has 8192" in reasons(64)[0]
    assert precision(torch.float32, triton_device.arch(torch.device("cuda:0"))) == "ieee"


@pytest.mark.parametrize("version", ["3.5.1", "3.6.0", "3.4.0", "9.1.0"])
def test_a_version_of_triton_is_a_reason(
    device: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    import triton

    device(90, 227 * KIB)
    monkeypatch.setattr(triton, "__version__", version)
    triton_device._import_triton.cache_clear()
    try:
        found = reasons(bias=True, requires_grad=True)
    finally:
        triton_device._import_triton.cache_clear()
    outside = [f"Triton {version} is outside the tested range 3.5 to 3.7"]
    assert found == ([] if version in ("3.5.1", "3.6.0") else outside)


EXPLAIN = """
import torch, fused_attn
x = torch.zeros(1, 1, 1, 1)
print(fused_attn.explain(x, x, x))
print(fused_attn.attention(x, x, x).shape)
"""


def test_without_a_gpu_the_reason_is_the_device() -> None:
    assert "needs tensors on a GPU, these are on cpu" in run(EXPLAIN)


def test_a_triton_that_fails_to_import_is_a_reason() -> None:
    broken = """
import sys, importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "triton":
            raise OSError("libtriton.so: wrong ELF class")
sys.meta_path.insert(0, Broken())
"""
    output = run(broken + EXPLAIN, TRITON_INTERPRET="1")
    assert "Triton cannot be imported: OSError: libtriton.so: wrong ELF class" in output


def test_an_untested_version_is_a_reason() -> None:
    output = run("import triton; triton.__version__ = '9.1.0'\n" + EXPLAIN, TRITON_INTERPRET="1")
    assert "Triton 9.1.0 is outside the tested range 3.5 to 3.7" in output
