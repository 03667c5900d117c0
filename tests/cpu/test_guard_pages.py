"""No CPU kernel, of any level, touches a byte beyond its tensors (`tests/cases/guard_pages.py`)."""

from __future__ import annotations

import pytest

from fused_attn.runtime import native
from tests.cases.guard_pages import OPERATIONS, run_against_guards


def levels() -> list[str]:
    return [] if native.why_not() is not None else native.module().available_cpu_levels()


@pytest.mark.parametrize("side", ["end", "front"])
@pytest.mark.parametrize("level", levels())
def test_nothing_beyond_a_tensor_is_touched(level: str, side: str) -> None:
    run_against_guards(side, "cpu", *OPERATIONS, FUSED_ATTN_CPU=level)
