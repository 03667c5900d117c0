"""Every peer against the formula: the real one where it is installed, else by its signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.suites import peers
from benchmarks.suites.judge import Judge
from benchmarks.suites.peers import flex
from benchmarks.suites.peers.peer import Peer
from benchmarks.suites.problem import Problem
from benchmarks.suites.suites import SUITES
from tests.cases import peer_stand_ins

STAND_INS = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "liger", "quack")


@pytest.mark.parametrize("name", STAND_INS)
def test_peers_are_called_by_their_signatures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the peers' signatures: what we pass, in their layout, gives the formula."""
    peer_stand_ins.install(monkeypatch)
    [named] = [peer for peer in peers.PEERS if peer.name == name]
    checked = 0
    for problem in toy_problems(named, ["needs an NVIDIA GPU"]):
        assert verdict(named, problem) is None, problem
        checked += 1
    assert checked >= 2


def verdict(named: Peer, problem: Problem) -> str | None:
    with torch.set_grad_enabled(problem.wants_gradient):
        judge = Judge(problem)
        return judge.verdict(lambda tensors: named.prepare(judge.problem, tensors))


def toy_problems(peer: Peer, reasons: list[str]) -> Iterator[Problem]:
    """One toy problem of each kind that the peer has no other reasons against.

    Every variant forward, every operation with gradient; float32 or, where that is refused, bf16.
    """
    seen = set()
    for suite in SUITES:
        shapes = [f"{shape},{v}" for shape in suite.toy for v in suite.variants] or suite.toy
        for problem in suite.problems("cpu", [torch.float32, torch.bfloat16], shapes):
            variant = None if problem.wants_gradient else problem.columns().get("variant")
            kind = (problem.operation, problem.direction, variant)
            if problem.operation not in peer.operations or suite.name == "decode" or kind in seen:
                continue
            if peer.why_not(problem) == reasons:
                seen.add(kind)
                yield problem


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without", "ignore:The PyTorch API of nested"
)
def test_compiled_peers_have_the_right_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to the compiler, run without one: seconds a case are not worth it here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiled = [peer for peer in peers.PEERS if peer.compiles]
    assert {peer.name for peer in compiled} == {"flex", "torch.compile"}
    monkeypatch.setattr(flex, "_compiled", eager_flex)
    for named in compiled:
        for problem in toy_problems(named, []):
            assert verdict(named, problem) is None, (named.name, problem)


def eager_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def test_onnxruntime_is_right_where_it_is_installed() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    [named] = [peer for peer in peers.PEERS if peer.name == "onnxruntime"]
    problems = list(toy_problems(named, []))
    assert {p.operation for p in problems} == {"attention", "add_norm", "bias_activation"}
    for problem in problems:
        assert verdict(named, problem) is None, problem
