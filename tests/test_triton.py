"""The Triton backends beyond what every backend is tested for; kernels run in the interpreter."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from cases import Case, run_backend, run_plain, skip_unless_supported
from torch import Tensor

import fused_attn
from fused_attn import attention, triton_runtime
from fused_attn.testing import attention_noise, check_against_oracle

pytest.importorskip("triton", reason="Triton is not installed")

DECODING = {
    "one query": Case(seqlen_k=700, seqlen_q=1, num_heads=4, num_heads_kv=2),
    "padded": Case(3, 4, 2, 1, 700, padding="empty"),
    "everything": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=3, seqlen_k=600, head_dim=20, head_dim_v=12,
        causal="lower_right", window=(500, 0), padding="mask", mask="b1qk", bias="1hqk",
        alibi=True, softcap=5.0, dropout_p=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODING)
def test_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.attention.triton import launch

    case = DECODING[name]
    tensors = case.tensors(torch.float32, requires_grad=False)
    skip_unless_supported(case, "triton", tensors)
    decoded = []
    decode = launch._decode
    monkeypatch.setattr(launch, "_decode", lambda *args: decoded.append(args[3]) or decode(*args))
    check_against_oracle(
        functools.partial(run_backend, case, "triton"),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse"),
        attention_noise,
    )
    assert decoded, "the splitting kernel did not run"
    assert min(decoded) > 1


GUARDED = {
    "causal, keys past the queries": Case(causal=True, seqlen_q=20, seqlen_k=150),
    "window past the keys": Case(window=(3, 3), seqlen_q=150, seqlen_k=20),
    "odd": Case(seqlen_q=33, seqlen_k=65, head_dim=13, bias="1hqk", mask="b11k", weights="average"),
    "padding": Case(padding="empty", seqlen_q=40, seqlen_k=70),
    "decoding": Case(seqlen_q=1, seqlen_k=600),
}


@pytest.mark.parametrize("name", GUARDED)
def test_nothing_beyond_the_tensors_is_read(name: str) -> None:
    """Each operand lies between NaNs: what is read past its ends shows."""
    case = GUARDED[name]
    tensors = case.tensors(torch.float32)
    skip_unless_supported(case, "triton", tensors)

    def results(operands: dict[str, Tensor]) -> list[Tensor]:
        outputs = [x for x in run_backend(case, "triton", **operands) if x is not None]
        wanted = [x for x in operands.values() if x.requires_grad]
        finite = [torch.where(x.isfinite(), x, 0.0).sum() for x in outputs]
        return [*outputs, *torch.autograd.grad(sum(finite), wanted)]

    def between_nans(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        margin = 1 << 16
        room = torch.full((x.numel() + 2 * margin,), torch.nan)
        inner = room[margin : margin + x.numel()].view(x.shape)
        inner.copy_(x.detach())
        return inner.requires_grad_(x.requires_grad)

    guarded = {key: between_nans(x) for key, x in tensors.items()}
    for actual, expected in zip(results(guarded), results(tensors), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", [Case(seqlen_q=70, seqlen_k=150), Case(causal=True)], ids=str)
def test_tensor_descriptors_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.attention.triton import config, launch

    tensors = case.tensors(torch.float32, requires_grad=False)
    skip_unless_supported(case, "triton", tensors)
    expected = run_backend(case, "triton", **tensors)
    made = []
    describe = launch._descriptor
    monkeypatch.setattr(config, "has_descriptors", lambda *kind: True)
    monkeypatch.setattr(config, "DESCRIPTOR_SEQLEN", 1)
    monkeypatch.setattr(launch, "_descriptor", lambda *a: made.append(a) or describe(*a))
    actual = run_backend(case, "triton", **tensors)
    assert len(made) == 3
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(x, y)


def test_the_interpreter_is_taken_by_name_only() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert fused_attn.explain(q, q, q).chosen != "triton"
    if triton_runtime.interpreted():
        assert fused_attn.explain(q, q, q, backend="triton").chosen == "triton"


def test_warming_up_compiles_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    assert fused_attn.warmup(q, k, v, backend="reference") == {}
    asked = []
    monkeypatch.setattr(
        triton_runtime._CompileOnly,
        "compile",
        lambda self, kernel, args, warps, stages: (
            asked.append(kernel.__name__) or self._record(kernel.__name__, None)
        ),
    )
    if not triton_runtime.why_not(q.device):
        seconds = fused_attn.warmup(q, k, v, causal=True, backend="triton")
        assert set(seconds) == set(asked)
        assert {"_attention_forward_kernel", "_attention_backward_dq_kernel"} <= set(asked)
        assert all(second >= 0 for second in seconds.values())


def test_limits_are_reasons() -> None:
    q = torch.randn(1, 1, 2, 300)
    with pytest.raises(fused_attn.UnsupportedError, match="head_dim=300"):
        attention(q, q, q, backend="triton")
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(fused_attn.UnsupportedError, match="float64"):
        attention(x, x, x, backend="triton")


def test_too_little_shared_memory_is_a_reason() -> None:
    from fused_attn.attention.triton import config

    for head_dim in (64, 128, 256):
        assert config.why_not(config.Kind(head_dim, 2, 86, 0, 99 << 10)) == []
        assert config.why_not(config.Kind(head_dim, 4, 80, 0, 99 << 10)) == []
    [reason] = config.why_not(config.Kind(256, 2, 80, 0, 48 << 10))
    assert "needs" in reason
    assert str(48 << 10) in reason


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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
