"""C++ kernels for the CPU (`csrc/attention/cpu`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, get_num_threads

from ...runtime import native
from .. import dispatch
from . import jit
from .problem import AttentionProblem, Operands, Options

NAME = "cpu"
OPERANDS = frozenset(("bias", "mask", "alibi_slopes", "dropout_rng")) | {
    *("key_padding_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k"),
    *("query_documents", "key_documents", "prefix_lengths"),
}
GRADIENTS = frozenset(("q", "k", "v", "bias"))


def why_not(problem: AttentionProblem) -> list[str]:
    return native.why_not_on(problem.device)


def computes_again(problem: AttentionProblem) -> bool:
    """True where `backward` can do without out and lse, and takes no longer.

    To keep them takes 1.7 us; the forward takes 0.4 us a head and, at the limit, as much for the
    products.
    """
    p = problem
    heads = p.batch * p.num_heads
    products = heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v)
    return heads <= 4 and products <= 2**14


def detail() -> str:
    """Which kernels they are."""
    return native.level()


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    threads = get_num_threads()
    native.module().attention_forward(operands, out, lse, options, threads)
    if operands.cu_seqlens_q is not None:
        _clear_past_the_end(operands.cu_seqlens_q, (out, 0.0), (lse, -torch.inf))


def forward_with_weights(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor | None,
    weights: Tensor,
    average: bool,
) -> None:
    native.module().attention_forward_with_weights(
        operands, out, lse, weights, average, options, get_num_threads()
    )


def backward(
    operands: Operands,
    options: Options,
    out: Tensor | None,
    lse: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    run, threads = native.module().attention_backward, get_num_threads()
    run(operands, out, lse, dout, dlse, dweights, dq, dk, dv, dbias, options, threads)
    if operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None:
        _clear_past_the_end(operands.cu_seqlens_q, (dq, 0.0))
        _clear_past_the_end(operands.cu_seqlens_k, (dk, 0.0), (dv, 0.0))


def why_not_functions(problem: AttentionProblem) -> list[str]:
    """Why no function of pairs can run there (`flex`); see `csrc/attention/functions.h`."""
    return native.why_not_on(problem.device)


def forward_with_functions(
    operands: Operands, options: Options, functions: tuple[Any, ...], out: Tensor, lse: Tensor
) -> None:
    prepared = _ready(operands, functions)
    dispatch.note(prepared.note)
    run = native.module().attention_forward_with_functions
    run(operands, out, lse, prepared.functions, options, get_num_threads())


def backward_with_functions(
    operands: Operands,
    options: Options,
    functions: tuple[Any, ...],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    prepared = _ready(operands, functions)
    run, threads = native.module().attention_backward_with_functions, get_num_threads()
    run(operands, out, lse, dout, dlse, dq, dk, dv, prepared.functions, options, threads)


def _ready(operands: Operands, functions: tuple[Any, ...]) -> jit.Ready:
    """Functions with their machine code, which lives as long as this."""
    pairs = math.prod(operands.q.shape[:3]) * operands.k.shape[2]
    return jit.ready(functions, operands.q.dtype, pairs)


def _clear_past_the_end(cu_seqlens: Tensor, *results: tuple[Tensor | None, float]) -> None:
    """Rows past the last packed sequence belong to nobody, and the kernels do not visit them."""
    end = int(cu_seqlens[-1])
    for result, value in results:
        if result is not None and end < result.shape[2]:
            result[:, :, end:] = value
