"""No Triton kernel touches a byte beyond its tensors; see `tests/cases/guard_pages.py`."""

from __future__ import annotations

import pytest

from fused_attn.runtime.triton import device as triton_device
from tests.cases.guard_pages import dies, run_against_guards

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("side", ["end", "front"])
@pytest.mark.parametrize("operation", ["attention", "packed", "layer_norm", "bias_activation"])
def test_nothing_beyond_a_tensor_is_touched(side: str, operation: str) -> None:
    if not triton_device.interpreted():
        pytest.skip("needs Triton's interpreter: guard pages are of the CPU's memory")
    run_against_guards(side, "triton", operation)


@pytest.mark.parametrize(("side", "element"), [("end", 3), ("front", -1)])
def test_a_guard_page_ends_the_process(side: str, element: int) -> None:
    """The tests above can fail: an element within is read, the next one is not."""
    code = f"import ctypes; x = place((3,), torch.float32, {side!r}).fill_(7.0)\n"
    code += "read = lambda i: ctypes.c_float.from_address(x.data_ptr() + 4 * i).value\n"
    assert not dies(code + "print(read(0), read(2))")
    assert dies(code + f"print(read({element}))")
