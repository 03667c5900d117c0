"""A pytest plugin for one's own CI: `pytest -p fused_attn.testing.plugin`.

    --fused-attn-fuzz N     N random calls of each operation and backend that can run here, as tests
    fused_attn_backend      a fixture: the name of each attention backend that can run here
    fused_attn_level        a fixture: the CPU kernels' level of instructions, "" without kernels

A test that takes `fused_attn_backend` runs once a backend. FUSED_ATTN_CPU, set before pytest
starts, chooses the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ..runtime import native
from .fuzz import run


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_attn")
    group.addoption("--fused-attn-fuzz", type=int, default=0, metavar="N",
                    help="random calls of each operation and backend of fused_attn")  # fmt: skip
    group.addoption("--fused-attn-seed", type=int, default=0, metavar="S",
                    help="seed of the first of them")  # fmt: skip


@pytest.fixture
def fused_attn_level() -> str:
    """The level of instructions that the CPU kernels run at here."""
    return "" if native.why_not() is not None else native.level()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fused_attn_backend" in metafunc.fixturenames:
        names = [b for b in run.backends_of("attention") if run.why_not("attention", b) is None]
        metafunc.parametrize("fused_attn_backend", names)


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    cases = config.getoption("--fused-attn-fuzz")
    if cases < 0:
        raise pytest.UsageError(f"--fused-attn-fuzz must be at least 0, got {cases}")
    if cases:
        items.extend(_items(session, cases, config.getoption("--fused-attn-seed")))


def _items(session: pytest.Session, cases: int, seed: int) -> Iterator[pytest.Item]:
    for op in run.OPERATIONS:
        for backend in run.backends_of(op, False):
            if run.why_not(op, backend) is None:
                name = f"fused_attn fuzz {op} {backend}"
                yield Fuzz.from_parent(session, name=name, call=(op, backend, cases, seed))


class Fuzz(pytest.Item):
    """The random calls of one operation and backend."""

    def __init__(self, *, call: tuple[str, str, int, int], **rest: Any) -> None:
        super().__init__(**rest)
        self.call = call

    def runtest(self) -> None:
        op, backend, cases, seed = self.call
        _, _, failures = run.fuzz(op, backend, cases, seed)
        if failures:
            text = "\n\n".join(f"{each.message}\n{each.repeat}" for each in failures)
            raise AssertionError(f"{len(failures)} random calls are wrong\n\n{text}")

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.name
