"""C++ kernels for the CPU (`csrc/linear/cpu`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import native
from . import measured
from .problem import LinearProblem, Operands, Options

NAME = "cpu"
OPERANDS = frozenset(("bias", "residual", "dropout_rng"))
GRADIENTS = frozenset(("x", "weight", "bias", "residual"))
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
    """Which kernels they are, and who says that they are the faster ones."""
    return f"{native.level()}; {measured.how()}"


def forward(operands: Operands, options: Options, y: Tensor) -> None:
    x, weight, bias, residual, rng = operands
    native.module().linear_forward(
        _by_rows(x), weight, bias, residual, rng, y, *options, _threads()
    )


def backward(
    operands: Operands,
    options: Options,
    dy: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
) -> None:
    x, weight, rng, threads = (
        _by_rows(operands.x),
        operands.weight,
        operands.dropout_rng,
        _threads(),
    )
    if dresidual is not None:
        dresidual.copy_(dy)
    dh = _by_rows(dy)
    if options.activation:
        dh, rng = _through_activation(x, operands, options, dh), None
    native.module().linear_backward(
        x, weight, rng, dh, dx, dweight, dbias, options.dropout_p, threads
    )


def _through_activation(x: Tensor, operands: Operands, options: Options, dy: Tensor) -> Tensor:
    """The gradient of the product, which is computed again: the forward keeps operands alone."""
    module, threads = native.module(), _threads()
    h = torch.empty((*x.shape[:-1], len(operands.weight)), dtype=x.dtype, device=x.device)
    nothing = Options()
    module.linear_forward(x, operands.weight, operands.bias, None, None, h, *nothing, threads)
    dh = torch.empty_like(h)
    module.bias_activation_backward(h, None, operands.dropout_rng, dy, dh, None, *options, threads)
    return dh


def _threads() -> int:
    return torch.get_num_threads()


def _by_rows(x: Tensor) -> Tensor:
    """x, copied if its rows are scattered: the kernel would read them number by number."""
    return x if x.stride()[-1] == 1 else x.contiguous()
