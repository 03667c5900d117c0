"""C++ kernels for the CPU (`csrc/attention/cpu*`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .problem import AttentionProblem, Operands, Options

NAME = "cpu"


def why_not(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"needs tensors on the CPU, these are on {problem.device}")
    missing = native.why_not()
    if missing is not None:
        reasons.append(missing)
    return reasons


# Small vectors that the kernels read densely; the tensors before them go by their strides.
_FIRST_VECTOR = Operands._fields.index("key_lengths")


def _dense_vectors(operands: Operands) -> tuple[Tensor | None, ...]:
    vectors = operands[_FIRST_VECTOR:]
    if all(x is None for x in vectors):
        return operands
    return operands[:_FIRST_VECTOR] + tuple(
        [None if x is None else x.contiguous() for x in vectors]
    )


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    threads = torch.get_num_threads()
    native.module().attention_forward(*_dense_vectors(operands), out, lse, *options, threads)
    if operands.cu_seqlens_q is not None:
        _clear_past_the_end(operands.cu_seqlens_q, (out, 0.0), (lse, -torch.inf))


def weights(
    operands: Operands, options: Options, lse: Tensor, weights: Tensor, average: bool
) -> None:
    threads = torch.get_num_threads()
    native.module().attention_weights(
        *_dense_vectors(operands), lse, weights, *options, average, threads
    )


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
    native.module().attention_backward(
        *_dense_vectors(operands),
        *(out, lse, dout, dlse, dweights),
        *(dq, dk, dv, dbias),
        *options,
        torch.get_num_threads(),
    )
    if operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None:
        _clear_past_the_end(operands.cu_seqlens_q, (dq, 0.0))
        _clear_past_the_end(operands.cu_seqlens_k, (dk, 0.0), (dv, 0.0))


def _clear_past_the_end(cu_seqlens: Tensor, *results: tuple[Tensor | None, float]) -> None:
    """Rows past the last packed sequence belong to nobody, and the kernels do not visit them."""
    end = int(cu_seqlens[-1])
    for result, value in results:
        if result is not None and end < result.shape[2]:
            result[:, :, end:] = value
