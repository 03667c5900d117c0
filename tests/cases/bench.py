"""What the tests of the benchmark suites share: toy sizes, made-up peers, short samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.suites import ceilings, cli, timing
from benchmarks.suites.operations import importing
from benchmarks.suites.operations.attention import Attention
from benchmarks.suites.peers.peer import Peer
from benchmarks.suites.problem import Prepared, leaves

TOY = Attention(
    dtype=torch.float32, batch=2, heads=2, heads_kv=2, seqlen_q=12, seqlen_k=12, head_dim=8
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short samples, one thread, small ceilings: what is tested is not how fast this machine is."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.001)
    monkeypatch.setitem(ceilings.COPY_ELEMENTS, "cpu", 2**16)
    monkeypatch.setattr(importing, "CODE", "import json  # not {package}\nprint(0.25)")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(*arguments: str) -> int:
    options = ["--device", "cpu", "--rounds", "2", "--passes", "1", "--quick"]
    return cli.main([*options, *arguments])


def peer(name: str, forward: Callable[[], object] | None = None, **facts: object) -> Peer:
    """A peer of attention that calls torch, or `forward` on top of it."""

    def prepare(problem: Attention, tensors: dict[str, torch.Tensor]) -> Prepared:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]

        def honest() -> torch.Tensor:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return out if forward is None else forward(out)

        return Prepared(honest, leaves(problem, tensors))

    return Peer(name, {"attention": prepare}, **facts)
