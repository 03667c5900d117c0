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


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    native.module().attention_forward(*operands, out, lse, *options, torch.get_num_threads())


def weights(
    operands: Operands, options: Options, lse: Tensor, weights: Tensor, average: bool
) -> None:
    threads = torch.get_num_threads()
    native.module().attention_weights(*operands, lse, weights, *options, average, threads)


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
        *operands,
        *(out, lse, dout, dlse, dweights),
        *(dq, dk, dv, dbias),
        *options,
        torch.get_num_threads(),
    )
