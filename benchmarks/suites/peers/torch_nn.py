"""Stock torch.nn modules, with the inference fast path and without."""

from __future__ import annotations

import functools

from torch import Tensor

from ..operations.modules import Module, fast_path
from ..problem import Prepared
from .peer import Peer


def _module(fast: bool, problem: Module, tensors: dict[str, Tensor]) -> Prepared:
    prepared = problem.prepare(problem.stock(), tensors)
    stock = prepared.forward

    def forward() -> object:
        with fast_path(fast):
            return stock()

    prepared.forward = forward
    return prepared


def _limits(problem: Module) -> list[str]:
    return ["the fast path is for inference alone"] if problem.wants_gradient else []


PEERS = (
    Peer("torch.nn", {"module": functools.partial(_module, False)}),
    Peer("torch.nn-fast", {"module": functools.partial(_module, True)}, limits=_limits),
)
