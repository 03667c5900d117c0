"""CUDA C++ kernels for NVIDIA GPUs from compute capability 8.0 on (`csrc/layer_norm/cuda`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import cuda as cuda_runtime
from ...runtime import verified
from .problem import LayerNormProblem, Operands, Options, describe

NAME = "cuda"
OPERANDS = frozenset(("residual", "weight", "bias", "dropout_rng"))
GRADIENTS = frozenset(("x", "residual", "weight", "bias"))

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)


def why_not(problem: LayerNormProblem) -> list[str]:
    reasons = cuda_runtime.why_not(problem.device, at_least=_OLDEST)
    if problem.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {problem.dtype}")
    for name in ("x", "residual"):
        dtype = getattr(problem, f"{name}_dtype")
        if dtype not in (None, problem.dtype):
            reasons.append(f"takes {name} in the dtype of the sum, {problem.dtype}, got {dtype}")
    return reasons


def only_by_name(problem: LayerNormProblem) -> str | None:
    """What ran on no such GPU yet is nobody's default; stand-ins are for tests."""
    if cuda_runtime.emulated():
        return "the emulated device is for tests"
    return verified.why_not("layer_norm", NAME, problem.device, problem.dtype)


def slower(problem: LayerNormProblem) -> str | None:
    """Where torch's own functions were faster on this kind of GPU."""
    return verified.slower("layer_norm", NAME, problem.device, problem.dtype)


def forward(
    operands: Operands,
    options: Options,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    rows = _Rows(options.dims)
    with rows.written_back(y, h) as (y_rows, h_rows):
        arguments = (
            rows.read(operands.x),
            rows.read(operands.residual),
            *_parameters(y.dtype, operands.weight, operands.bias),
            operands.dropout_rng,
            *(y_rows, h_rows, _flat(mean), _flat(rstd)),
            *options[1:],
        )
        cuda_runtime.launch(
            "layer_norm_forward_cuda", arguments, y.device, lambda: _problem(operands, options)
        )


def backward(
    operands: Operands,
    options: Options,
    summed: bool,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    rows = _Rows(options.dims)
    x = rows.read(operands.x)
    dy_rows = rows.read(dy)
    assert dy_rows is not None
    count, width = dy_rows.shape
    module = cuda_runtime.module()
    parameters = [_Parameter(dweight), _Parameter(dbias)]
    with rows.written_back(dx, dresidual) as (dx_rows, dres_rows):
        with cuda_runtime.on(dy.device):
            parts = module.layer_norm_parts_cuda(count)
        workspace = torch.empty(2 * parts * width, dtype=torch.float32, device=dy.device)
        arguments = (
            *((None, None) if summed else (x, rows.read(operands.residual))),
            *(*_parameters(dy.dtype, operands.weight), operands.dropout_rng, x if summed else None),
            *(_flat(mean), _flat(rstd), dy_rows, rows.read(dh)),
            *(dx_rows, dres_rows, parameters[0].sums, parameters[1].sums, workspace),
            *(options.rms, options.dropout_p),
        )
        cuda_runtime.launch(
            "layer_norm_backward_cuda", arguments, dy.device, lambda: _problem(operands, options)
        )
        for parameter in parameters:
            parameter.write_back()


def _problem(operands: Operands, options: Options) -> LayerNormProblem:
    x = operands.x
    return describe(operands, options, tuple(x.shape[x.dim() - options.dims :]))


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1).contiguous()


def _parameters(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    """Flat, and all in `dtype` or all in float32, which is what the kernels read."""
    flat = [_flat(parameter) for parameter in parameters]
    if all(parameter is None or parameter.dtype == dtype for parameter in flat):
        return flat
    return [None if parameter is None else parameter.float() for parameter in flat]


class _Parameter:
    """A parameter's gradient; kernels write no float64, so that goes by way of float32."""

    def __init__(self, gradient: Tensor | None) -> None:
        self._gradient = gradient
        self.sums = _flat(gradient)
        if self.sums is not None and self.sums.dtype not in _DTYPES:
            self.sums = torch.empty_like(self.sums, dtype=torch.float32)

    def write_back(self) -> None:
        if self._gradient is None or self.sums is None:
            return
        if self._gradient.data_ptr() != self.sums.data_ptr():
            self._gradient.copy_(self.sums.view(self._gradient.shape))


class _Rows:
    """Tensors as dense (rows, width); the last `dims` dimensions are the row."""

    def __init__(self, dims: int) -> None:
        self._dims = dims

    def read(self, tensor: Tensor | None) -> Tensor | None:
        """`tensor` as rows; a copy only if it is not dense."""
        if tensor is None:
            return None
        width = tensor.shape[tensor.dim() - self._dims :].numel()
        count = tensor.shape[: tensor.dim() - self._dims].numel()
        return tensor.contiguous().view(count, width)

    def written_back(self, *results: Tensor | None) -> _WrittenBack:
        """The results as rows to write to, and then in their place."""
        return _WrittenBack(self, results)


class _WrittenBack:
    def __init__(self, rows: _Rows, results: tuple[Tensor | None, ...]) -> None:
        self._results = results
        self._rows = [rows.read(result) for result in results]

    def __enter__(self) -> list[Tensor | None]:
        return self._rows

    def __exit__(self, *error: object) -> None:
        for result, rows in zip(self._results, self._rows, strict=True):
            if result is not None and rows is not None and not result.is_contiguous():
                result.copy_(rows.view(result.shape))
