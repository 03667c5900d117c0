"""CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and later (`csrc/layer_norm/cuda*`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_runtime
from .problem import LayerNormProblem, Operands, Options

NAME = "cuda"

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
    for name in ("weight", "bias"):
        dtype = getattr(problem, f"{name}_dtype")
        if dtype not in (None, problem.dtype, torch.float32):
            reasons.append(f"takes {name} in {problem.dtype} or float32, got {dtype}")
    if problem.weight_dtype and problem.bias_dtype not in (None, problem.weight_dtype):
        reasons.append("takes weight and bias of one dtype")
    return reasons


def only_by_name() -> bool:
    """The emulator is for tests."""
    return cuda_runtime.emulated()


def forward(
    operands: Operands,
    options: Options,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    rows = _Rows(options.dims)
    with cuda_runtime.on(y.device), rows.written_back(y, h) as (y_rows, h_rows):
        cuda_runtime.module().layer_norm_forward_cuda(
            rows.read(operands.x),
            rows.read(operands.residual),
            _flat(operands.weight),
            _flat(operands.bias),
            operands.rng,
            *(y_rows, h_rows, _flat(mean), _flat(rstd)),
            *options[1:],
            cuda_runtime.stream(y.device),
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
    assert x is not None and dy_rows is not None
    count, width = dy_rows.shape
    module = cuda_runtime.module()
    with cuda_runtime.on(dy.device), rows.written_back(dx, dresidual) as (dx_rows, dres_rows):
        parts = module.layer_norm_parts_cuda(count)
        workspace = torch.empty(2 * parts * width, dtype=torch.float32, device=dy.device)
        module.layer_norm_backward_cuda(
            *((None, None) if summed else (x, rows.read(operands.residual))),
            *(_flat(operands.weight), operands.rng, x if summed else None),
            *(_flat(mean), _flat(rstd), dy_rows, rows.read(dh)),
            *(dx_rows, dres_rows, _flat(dweight), _flat(dbias), workspace),
            *(options.rms, options.dropout_p, cuda_runtime.stream(dy.device)),
        )


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1).contiguous()


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
