"""No Triton kernel touches a byte beyond its tensors; see `tests/cases/guard_pages.py`."""

from __future__ import annotations

import pytest
import torch

from fused_attn.runtime.triton import device as triton_device
from tests.cases.guard_pages import dies, run_against_guards

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("side", ["end", "front"])
@pytest.mark.parametrize("operation", ["attention", "packed", "layer_norm", "bias_activation"])
def test_nothing_beyond_a_tensor_is_touched(side: str, operation: str) -> None:
    if not triton_device.interpreted():
        pytest.skip("needs Triton's interpreter: guard pages are of the CPU's memory")
    run_against_guards(side, "triton", operation)


@pytest.mark.parametrize("side", ["end", "front"])
def test_a_guard_page_ends_the_process(side: str) -> None:
    """The tests above can fail."""
    assert dies(f"print(place((3,), torch.float32, {side!r}).as_strided((1,), (1,), %d).item())"
                % (3 if side == "end" else 0)) == (side == "end")  # fmt: skip


def test_the_interpreter_is_there() -> None:
    assert triton_device.interpreted() or torch.cuda.is_available()
