"""The Triton backends beyond what every backend is tested for; kernels run in the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.runtime.triton import device as triton_device
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain, skip_unless_supported
from tests.cases.fresh_process import run

pytest.importorskip("triton", reason="Triton is not installed")

DECODING = {
    "one query": Case(seqlen_k=700, seqlen_q=1, num_heads=4, num_heads_kv=2),
    "padded": Case(3, 4, 2, 1, 700, padding="empty"),
    "keys that no number of parts divides": Case(seqlen_k=1021, seqlen_q=1),
    "a last part of one key": Case(seqlen_k=1025, seqlen_q=1, num_heads_kv=1),
    "everything": Case(
        num_heads=4, num_heads_kv=2, seqlen_q=3, seqlen_k=600, head_dim=20, head_dim_v=12,
        causal="lower_right", window=(500, 0), padding="mask", mask="b1qk", bias="1hqk",
        alibi=True, softcap=5.0, dropout_p=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODING)
def test_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.ops.attention.triton import launch

    case = DECODING[name]
    tensors = case.tensors(torch.float32, requires_grad=False)
    skip_unless_supported(case, "triton", tensors)
    decoded = []
    decode = launch._decode
    monkeypatch.setattr(
        launch,
        "_decode",
        lambda launcher, *rest: decoded.append(launcher.plan.splits) or decode(launcher, *rest),
    )
    check_against_oracle(
        functools.partial(run_backend, case, "triton"),
        functools.partial(run_plain, case),
        tensors,
        ("out", "lse"),
        attention_noise,
    )
    assert decoded, "the splitting kernel did not run"
    assert min(decoded) > 1


def test_a_bias_gradient_whose_steps_do_not_fall_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems give each program one step; long ones share them out."""
    from fused_attn.ops.attention.triton import config

    monkeypatch.setattr(config, "ENOUGH_PROGRAMS", 3)  # for 2 * 2 heads
    case = Case(2, 2, 2, 5, 7, bias="11qk")
    check_against_oracle(
        functools.partial(run_backend, case, "triton"),
        functools.partial(run_plain, case),
        case.tensors(torch.float32),
        ("out", "lse"),
        attention_noise,
    )


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
    from fused_attn.ops.attention.triton import config, launcher

    tensors = case.tensors(torch.float32, requires_grad=False)
    skip_unless_supported(case, "triton", tensors)
    expected = run_backend(case, "triton", **tensors)
    made = []
    describe = launcher._descriptor
    monkeypatch.setattr(config, "has_descriptors", lambda *kind: True)
    monkeypatch.setattr(config, "DESCRIPTOR_SEQLEN", 1)
    monkeypatch.setattr(launcher, "_descriptor", lambda *a: made.append(a) or describe(*a))
    actual = run_backend(case, "triton", **tensors)
    assert len(made) == 3
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(x, y)


def test_the_interpreter_is_taken_by_name_only() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert fused_attn.explain(q, q, q).chosen != "triton"
    if triton_device.interpreted():
        assert fused_attn.explain(q, q, q, backend="triton").chosen == "triton"


def test_warming_up_compiles_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    assert fused_attn.warmup(q, k, v, backend="reference") == {}
    if triton_device.why_not(q.device):
        pytest.skip("Triton cannot run here")
    asked = compiling_nothing(monkeypatch)
    seconds = fused_attn.warmup(q, k, v, causal=True, backend="triton")
    assert set(seconds) == {name for name, _ in asked}
    assert {"_attention_forward_kernel", "_attention_backward_dq_kernel"} <= set(seconds)
    assert all(second >= 0 for second in seconds.values())


def compiling_nothing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the compiler from now on, as kernel and constants."""
    from fused_attn.runtime.triton.device import Wanted, _CompileOnly

    asked = []

    def launch(self, kernel, args, warps, stages):
        constants = f"{args[-1]}, {warps}, {stages}"
        note = functools.partial(asked.append, (kernel.__name__, constants))
        self.on_launch(Wanted(kernel.__name__, constants, note))

    monkeypatch.setattr(_CompileOnly, "launch", launch)
    return asked


def operation_calls() -> dict[str, tuple[int, Callable[[], dict[str, float]]]]:
    """Of each kind of call: how many kernels it may compile, and its warmup."""
    warm = functools.partial(fused_attn.warmup, backend="triton")
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    many = torch.randn(1, 2, 700, 8)
    bias = torch.randn(1, 2, 9, 9, requires_grad=True)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    norm = functools.partial(warm, fused_attn.add_layer_norm, x, x.detach(), (32,), weight, weight)
    return {
        "forward": (1, lambda: warm(q.detach(), k.detach(), v.detach())),
        "decode": (2, lambda: warm(many[:, :, :1], many, many)),
        "forward and backward": (4, lambda: warm(q, k, v, causal=True)),
        "bias": (6, lambda: warm(q, k, v, bias=bias)),
        "mask": (7, lambda: warm(q, k, v, mask=mask)),
        "weights": (7, lambda: warm(q, k, v, return_weights="average")),
        "layer norm": (2, norm),
        "bias activation": (
            2, lambda: warm(fused_attn.bias_activation, x, weight, activation="gelu"),
        ),
    }  # fmt: skip


def test_warming_up_serves_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first call of a kind compiles no more kernels than are stated, at any length."""
    if triton_device.why_not(torch.device("cpu")):
        pytest.skip("Triton cannot run here")
    for name, (most, call) in operation_calls().items():
        asked = compiling_nothing(monkeypatch)
        assert call(), f"{name} compiles nothing"
        assert 0 < len(set(asked)) <= most, f"{name}: {sorted(set(asked))}"


def test_the_first_launch_says_what_it_took(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q = torch.randn(1, 1, 4, 8)
    if triton_device.why_not(q.device):
        pytest.skip("Triton cannot run here")
    monkeypatch.setattr(triton_device, "_launched", set())
    with caplog.at_level("INFO", logger="fused_attn.runtime.triton.device"):
        for _ in range(2):
            fused_attn.attention(q, q, q, backend="triton")
    [message] = caplog.messages
    assert message.startswith("first launch of _attention_forward_kernel took ")


def test_longer_calls_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    if triton_device.why_not(torch.device("cpu")):
        pytest.skip("Triton cannot run here")
    asked = compiling_nothing(monkeypatch)
    for length in (9, 33, 600):
        x = torch.randn(2, 2, length, 8, requires_grad=True)
        fused_attn.warmup(x, x, x, causal=True, backend="triton")
    assert len(set(asked)) == 4


WARM_UP_AHEAD = """
import torch, fused_attn
q = torch.randn(1, 2, 64, 64, dtype=torch.float16)
print(sorted(fused_attn.warmup(q, q, q, arch=90)))
x = torch.randn(8, 64)
print(sorted(fused_attn.warmup(fused_attn.layer_norm, x, (64,), arch=80)))
print(fused_attn.explain(q, q, q).chosen)
"""


def test_warming_up_for_another_gpu(tmp_path: Path) -> None:
    """Without any GPU: the compiled kernels lie in Triton's cache afterwards."""
    output = run(WARM_UP_AHEAD, TRITON_CACHE_DIR=str(tmp_path), HOME=str(tmp_path))
    attention, norm, chosen = output.splitlines()
    assert attention == "['_attention_forward_kernel']"
    assert norm == "['_layer_norm_forward_kernel']"
    assert chosen != "triton"
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_warming_up_for_another_gpu_is_refused_in_the_interpreter() -> None:
    if not triton_device.interpreted():
        pytest.skip("Triton compiles here")
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        fused_attn.warmup(q, q, q, arch=90)


@pytest.mark.parametrize("name", ["forward", "decode", "packed"])
def test_rows_that_are_too_far_apart_are_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets within a tile take 32 bits; with the limit lowered, everything is too far apart."""
    from fused_attn.ops.attention.triton import launcher

    lengths = {"forward": (33, 40), "decode": (1, 600), "packed": (33, 33)}[name]
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (lengths[0], *lengths[1:] * 2))

    def results() -> list[Tensor]:
        if name == "packed":
            cu = torch.tensor([0, 10, 30], dtype=torch.int32)
            rows = [x[0].transpose(0, 1) for x in (q, k, v)]
            out = fused_attn.attention_varlen(*rows, cu, cu, 20, 20, backend="triton")
        else:
            out = fused_attn.attention(q, k, v, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    skip_unless_supported(Case(), "triton", {"q": q, "k": k, "v": v})
    expected = results()
    monkeypatch.setattr(launcher, "FAR_ROWS", 1)
    assert launcher.has_far_rows(q)
    for actual, near in zip(results(), expected, strict=True):
        assert torch.equal(actual, near)


def test_strides_of_scores_take_64_bits_where_they_need_them() -> None:
    """Shifted, as kernels get them, a stride of 2^23 is no 32-bit number any more."""
    from fused_attn.ops.attention.triton.launcher import score_view

    bias = torch.empty(1, 1, 2, 3, device="meta").as_strided((1, 1, 2, 3), (1, 1, 1 << 23, 1))
    *_, rows, last = score_view(bias, 3).strides
    assert rows > 2**31
    assert rows >> 8 == 1 << 23
    assert last == 1
    assert all(stride % 16 != 0 and stride != 1 for stride in score_view(bias, 3).strides[:3])
