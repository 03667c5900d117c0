"""C++ kernels for the CPU (`csrc/linear/cpu`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import native
from . import measured
from .problem import LinearProblem, Operands, Options

NAME = "cpu"
OPERANDS = frozenset(("bias",))
GRADIENTS = frozenset(("x", "weight", "bias"))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(problem: LinearProblem) -> list[str]:
    reasons = native.why_not_on(problem.device)
    if problem.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {problem.dtype}")
    return reasons


def only_by_name(problem: LinearProblem) -> str | None:
    """Where torch's product is the faster one, or nobody has measured."""
    return measured.why_torch(problem)


def detail() -> str:
    """Which kernels they are."""
    return native.level()


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    x, weight, bias = operands
    native.module().linear_forward(_by_rows(x), weight, bias, y, torch.get_num_threads())


def backward(
    operands: Operands,
    options: Options,
    dy: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    x, weight, _ = operands
    native.module().linear_backward(
        _by_rows(x), weight, _by_rows(dy), dx, dweight, dbias, torch.get_num_threads()
    )


def _by_rows(x: Tensor) -> Tensor:
    """x, copied if its rows are scattered: the kernel would read them number by number."""
    return x if x.stride()[-1] == 1 else x.contiguous()
