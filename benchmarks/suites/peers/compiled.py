"""torch.compile of the plain formula, and of stock torch.nn modules."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch
from torch import Tensor

from ..operations.attention import SOFTCAP, Attention
from ..operations.modules import Module
from ..operations.packed import Packed
from ..problem import Prepared, Problem, leaves
from .peer import Peer
from .sdpa import additive_or_bool_mask, too_many_scores

MOST_SIZES = 1000  # torch gives up compiling a function anew after 8


def compile_for_timing(function: Any, dynamic: bool | None = False, whole: bool = True) -> Any:
    """torch.compile, with a backward that may run again and again.

    Args:
        dynamic: as torch.compile's; False compiles for each size alone.
        whole: a break in the graph is an error. So is a size too many, or else what does not
            compile would run eagerly under the name of what does.
    """
    functorch.donated_buffer = False
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = MOST_SIZES
    return torch.compile(function, dynamic=dynamic, fullgraph=whole)


def _attention(problem: Attention, tensors: dict[str, Tensor]) -> Prepared:
    mask = additive_or_bool_mask(problem, tensors)
    if problem.variant == "causal" and mask is None:
        shape = (problem.seqlen_q, problem.seqlen_k)
        mask = torch.ones(shape, device=problem.device, dtype=torch.bool).tril()
    group = problem.heads // problem.heads_kv
    scale = problem.head_dim**-0.5

    def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.transpose(-2, -1) * scale
        if problem.variant == "softcap":
            scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ v

    run = compile_for_timing(formula)
    q, k, v = (tensors[name] for name in "qkv")
    return Prepared(lambda: run(q, k, v, mask), leaves(problem, tensors))


def _formula(problem: Problem, tensors: dict[str, Tensor]) -> Prepared:
    run = compile_for_timing(lambda **tensors: problem.formula(**tensors))
    return Prepared(lambda: run(**tensors), leaves(problem, tensors))


def _module(problem: Module, tensors: dict[str, Tensor]) -> Prepared:
    module = problem.stock()
    run = compile_for_timing(module, whole=False)
    prepared = problem.prepare(module, tensors)
    args, keywords = problem.arguments(tensors)
    prepared.forward = lambda: run(*args, **keywords)
    return prepared


def _limits(problem: Problem) -> list[str]:
    return too_many_scores(problem) if isinstance(problem, (Attention, Packed)) else []


PEERS = (
    Peer(
        "torch.compile",
        {
            "attention": _attention,
            "add_norm": _formula,
            "bias_activation": _formula,
            "embedding": _formula,
            "module": _module,
        },
        limits=_limits,
        compiles=True,
    ),
)
