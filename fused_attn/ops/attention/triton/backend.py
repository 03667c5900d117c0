"""Triton kernels for GPUs (`forward.py`, `backward.py`, ...)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....runtime import verified
from ....runtime.triton import device as triton_device
from ..functions import PairFunctions, Value
from ..problem import NO_WEIGHTS, AttentionProblem, Operands, Options
from . import config

NAME = "triton"
OPERANDS = frozenset(("bias", "mask", "alibi_slopes", "dropout_rng")) | {
    *("key_padding_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k"),
    *("query_documents", "key_documents", "prefix_lengths"),
}
GRADIENTS = frozenset(("q", "k", "v", "bias"))

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(problem: AttentionProblem) -> list[str]:
    reasons = triton_device.why_not(problem.device)
    if problem.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {problem.dtype}")
    if problem.dtype == torch.bfloat16 and triton_device.interpreted():
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem, name)
        if size > MAX_HEAD_DIM:
            reasons.append(f"serves head sizes up to {MAX_HEAD_DIM}, got {name}={size}")
    if not reasons:
        reasons += config.why_not(*_wanted(problem))
    return reasons


def _wanted(problem: AttentionProblem) -> tuple[config.ProblemClass, tuple[str, ...], int]:
    """What decides the tiles of a call, the kernels that it runs, and the rows of decoding."""
    heavy = ("bias", "mask", "key_padding_mask", "dropout_rng", "query_documents")
    kind = config.ProblemClass(
        max(problem.head_dim, problem.head_dim_v),
        problem.dtype.itemsize,
        triton_device.arch(problem.device),
        sum(name in problem.operands for name in heavy) + (problem.options.softcap > 0),
        triton_device.shared_memory(problem.device),
    )
    kernels = ["forward"]
    sizes = (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
    if any(isinstance(size, torch.SymInt) for size in sizes):
        # Whichever it will be: a comparison would bind the graph that is traced to these sizes.
        rows = config.MAX_DECODE_ROWS
        kernels.append("decode")
    else:
        rows = problem.seqlen_q * (problem.num_heads // problem.num_heads_kv)
        planes = problem.num_heads_kv * problem.batch
        multiprocessors = triton_device.multiprocessors(problem.device)
        if config.decode_splits(rows, problem.seqlen_k, planes, multiprocessors) > 1:
            kernels = ["decode"]
    if problem.requires_grad:
        kernels += ["dkdv", "dq"]
    if problem.bias_shape is not None and problem.requires_grad:
        kernels.append("bias")
    if problem.weights != NO_WEIGHTS:
        kernels.append("weights")
    return kind, tuple(kernels), rows


def only_by_name(problem: AttentionProblem) -> str | None:
    """What ran on no such GPU yet is nobody's default; stand-ins are for tests."""
    if triton_device.interpreted():
        return "Triton's interpreter is for tests"
    return verified.why_not(
        "attention", NAME, problem.device, problem.dtype, max(problem.head_dim, problem.head_dim_v)
    )


def slower(problem: AttentionProblem) -> str | None:
    """Where torch's own functions were faster on this kind of GPU."""
    return verified.slower(
        "attention", NAME, problem.device, problem.dtype, max(problem.head_dim, problem.head_dim_v)
    )


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    _launchers().forward(operands, options, out, lse)


def forward_with_weights(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    weights: Tensor,
    average: bool,
) -> None:
    forward(operands, options, out, lse)
    _launchers().weights(operands, options, lse, weights, average)


def backward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    _launchers().backward(operands, options, out, lse, dout, dlse, dweights, (dq, dk, dv, dbias))


# Functions of pairs are given as values, of which this backend makes its own code.
READS_VALUES = True
HOW_FUNCTIONS_RUN = "in the loop of the Triton kernels"


def why_not_functions(problem: AttentionProblem) -> list[str]:
    """Why no function of pairs can run there (`flex`); see `function_source.py`."""
    return why_not(problem)


def only_by_name_functions(problem: AttentionProblem) -> str | None:
    """As `only_by_name`; no self-test has functions yet, so on a GPU they always are."""
    if triton_device.interpreted():
        return only_by_name(problem)
    size = max(problem.head_dim, problem.head_dim_v)
    return verified.why_not("flex_attention", NAME, problem.device, problem.dtype, size)


def why_not_gradient(load: Value, leaves: Sequence[Any]) -> str | None:
    """Why the gradient of what is loaded cannot be added up in a fixed order; None if it can."""
    from . import function_terms

    if leaves[load.leaf].place != "table" or function_terms.table_indices(load, leaves):
        return None
    return "wants the gradient of a table that is indexed by more than plain positions"


def forward_with_functions(
    operands: Operands, options: Options, functions: PairFunctions, out: Tensor, lse: Tensor
) -> None:
    _launchers().forward(operands, options, out, lse, functions)


def backward_with_functions(
    operands: Operands,
    options: Options,
    functions: PairFunctions,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    grads = (dq, dk, dv, None)
    _launchers().backward(operands, options, out, lse, dout, dlse, None, grads, functions)


@functools.cache
def _launchers() -> Any:
    from . import launch  # imports Triton

    return launch
