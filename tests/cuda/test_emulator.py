"""The judge of the CUDA kernels is judged: the emulated device must find every planted mistake.

`csrc/emulator/faults.cpp` holds a small kernel and the mistakes; the real kernels run on the same
machine in every test that takes the `cuda` backend.
"""

from __future__ import annotations

import pytest
import torch

from fused_attn import attention
from fused_attn.ops.attention import cuda
from fused_attn.runtime import cuda as cuda_runtime

pytestmark = pytest.mark.skipif(
    not cuda_runtime.emulated(), reason="the emulator is not built (make test builds it)"
)
SCHEDULES = range(10)

# What the report must say; which of several depends on the schedule.
EXPECTED: dict[str, str | tuple[str, ...]] = {
    "no full wait": ("without a wait for full", "deadlock"),
    "wrong phase": ("deadlock", "nobody has written yet", "without a wait for full", "still read"),
    "no release": "deadlock: warp 0 waits for mbarrier empty",
    "early release": "while a matrix product may still read it",
    "too few bytes": ("without a wait for full", "nobody has written yet", "still read"),
    "too many bytes": "waits for mbarrier full",
    "two arrivals": ("more than 1 arrivals", "deadlock"),
    "no matrix fence": "without wgmma.fence",
    "no matrix wait": "wrong result",
    "accumulator touched": "accumulator was written while its product was in flight",
    "operand touched": "register operand changed",
    "no proxy fence": "without a proxy fence",
    "no store wait": "thread ends while 1 bulk stores",
    "misaligned tile": "not 1024-byte aligned",
    "out of bounds": "leaves the",
    "unwritten": "which nobody has written yet",
    "unswizzled": "without the 128-byte swizzle",
    "divergence": "diverged",
    "barrier count": ("barrier 2 is used for", "waits for named barrier 2"),
    "lonely barrier": "waits for named barrier 2",
    "no barrier init": "no mbarrier was initialised",
    "too many registers": "warps ask for",
    "products left": "without waiting for its matrix products",
    "no reduction fence": "without a proxy fence",
    "stage reused": "while a bulk store may still read it",
    "reduction forgotten": "not committed",
    "misaligned reduction": "not 16-byte aligned",
    "no reduction wait": "bulk stores may read shared memory",
    "one lane waits": ("bulk stores may read shared memory", "bulk store may still read it"),
    "load skipped": "waits for mbarrier full",
    "visit skipped": ("loads are on their way", "wrong result"),
    "one arrival": "copy into shared offset",
    "unordered load": "nothing orders it after thread",
    "unordered store": "nothing orders it after thread",
    "unordered copy": "copy from shared offset",
    "unordered product": "wgmma: nothing orders it after thread",
    "no init fence": "initialised without a fence",
    "no init barrier": ("nothing orders this use of mbarrier", "no mbarrier was initialised"),
    "two blocks": "global memory that another block of the launch writes",
    "two blocks add": "global memory that another block of the launch writes",
    "partial piece": "writes past the 60 columns of its map",
    "shifted map": "whose base is not its tensor's own pointer",
}


def test_the_right_kernel_is_found_right() -> None:
    for seed in range(100):
        assert cuda_runtime.module().run_fault("none", seed) == []


def test_every_fault_has_its_expectation() -> None:
    assert set(cuda_runtime.module().fault_names()) == {"none", *EXPECTED}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_planted_mistake_is_reported(name: str) -> None:
    expected = EXPECTED[name]
    texts = (expected,) if isinstance(expected, str) else expected
    for seed in SCHEDULES:
        report = "\n".join(cuda_runtime.module().run_fault(name, seed))
        assert any(text in report for text in texts), f"schedule {seed} reports {report!r}"


@pytest.mark.parametrize("bias", [None, (1, 2, 70, 90), (3, 1, 1, 90), (1, 1, 70, 1)])
def test_the_order_of_blocks_threads_and_engines_changes_no_bit(
    bias: tuple[int, ...] | None,
) -> None:
    q, k, v = (torch.randn(3, 2, n, 64).half().requires_grad_() for n in (70, 90, 90))
    operands = [q, k, v] + ([] if bias is None else [torch.randn(bias).requires_grad_()])
    results = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    for seed in (1, 1000, 2000):
        cuda_runtime.module().set_seed(seed)
        out = attention(q, k, v, bias=operands[3] if bias else None, backend="cuda")
        results.append((out, *torch.autograd.grad(out.float().square().sum(), operands)))
    torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_padding_of_more_keys_than_there_are_bits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 2, n, 16).half().requires_grad_() for n in (20, 300, 300))
    keep, mask = torch.rand(2, 300) > 0.5, torch.rand(2, 1, 20, 300) > 0.3
    results = []
    for limit in (cuda.MAX_PADDED_KEYS, 256):
        monkeypatch.setattr(cuda, "MAX_PADDED_KEYS", limit)
        for operands in ({}, {"mask": mask}):
            out = attention(q, k, v, key_padding_mask=keep, backend="cuda", **operands)
            results.append((out, *torch.autograd.grad(out.float().sum(), (q, k, v))))
    for few, many in zip(results[:2], results[2:], strict=True):
        for expected, actual in zip(few, many, strict=True):
            torch.testing.assert_close(actual, expected)
