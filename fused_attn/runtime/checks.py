"""Argument checks that speak: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import hints, subclasses

ID_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def type_name(value: object) -> str:
    """How a wrong value is named in a message: dtype and shape for a tensor, else its type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(getattr(value, "shape", None), tuple):  # NumPy's, JAX's, ...
        return f"{type(value).__name__} of shape {value.shape}"  # type: ignore[attr-defined]
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def present(operands: Any) -> tuple[str, ...]:
    """Names of the optional operands (fields of a named tuple with a default) that are there."""
    optional = operands._field_defaults
    return tuple(name for name in optional if getattr(operands, name) is not None)


def expect_any_tensor(name: str, value: object) -> None:
    """A tensor, be it nested, sparse or of a subclass."""
    if not isinstance(value, Tensor):
        raise TypeError(
            hints.with_hint(
                f"`{name}` must be a tensor, got {type_name(value)}",
                hints.for_no_tensor(name, value),
            )
        )


def expect_tensor(name: str, value: object) -> None:
    """A dense tensor, of torch's own class or of a subclass whose rules are known."""
    expect_any_tensor(name, value)
    assert isinstance(value, Tensor)
    if type(value) not in (Tensor, torch.nn.Parameter) and not subclasses.is_understood(value):
        raise TypeError(
            f"`{name}` must be a plain tensor, got a {type(value).__name__}, a subclass of Tensor "
            f"with rules of its own (__torch_function__)\nhint: where it is no more than its "
            f"numbers, pass `{name}.as_subclass(torch.Tensor)`"
        )
    if value.layout != torch.strided and not value.is_nested:
        raise TypeError(
            f"`{name}` must be dense, got layout {value.layout}\nhint: `{name}.to_dense()`"
        )


def expect_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    expect_tensor(name, tensor)
    if tensor.dim() != rank:
        raise ValueError(
            f"`{name}` must have {rank} dimensions {layout}, got shape {tuple(tensor.shape)}"
        )


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    expect_tensor(name, tensor)
    if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(
            f"`{name}` must have shape {layout} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def expect_broadcastable(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    expect_tensor(name, tensor)
    sizes = tensor.shape
    fits = len(sizes) <= len(shape) and all(
        size in (1, full)
        for size, full in zip(sizes, shape[len(shape) - len(sizes) :], strict=True)
    )
    if not fits:
        message = f"`{name}` must be broadcastable to {layout} = {tuple(shape)}, got {tuple(sizes)}"
        cut = len(sizes) > 0 and sizes[-1] > shape[-1]  # such as a mask made for a whole cache
        hint = f"`{name}[..., :{shape[-1]}]`, if what lies beyond is of no key" if cut else None
        raise ValueError(hints.with_hint(message, hint))


def expect_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        message = f"`{name}` must be {expected}, got {tensor.dtype}"
        raise TypeError(hints.with_hint(message, hints.for_dtype(name, tensor, dtypes)))


def expect_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"`{name}` must be on {device}, got {tensor.device}\nhint: `{name}.to({str(device)!r})`"
        )


def expect_integer(name: str, value: object, least: int | None = None) -> int:
    """An int, of at least `least`; symbolic ones, which compilers trace with, are taken."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"`{name}` must be an int, got {type_name(value)}")
    if least is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value  # type: ignore[return-value]


def expect_finite(name: str, value: object) -> float:
    number = _number(name, value)
    if not -math.inf < number < math.inf:  # math.isfinite cannot be traced
        raise ValueError(f"`{name}` must be finite, got {number}")
    return number


def expect_probability(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"`{name}` must be in [0, 1], got {number}")
    return number


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = f"`float({name})`" if hasattr(value, "item") else None
        raise TypeError(hints.with_hint(f"`{name}` must be a number, got {type_name(value)}", hint))
    return float(value)


def expect_no_gradient(name: str, out: Tensor, wanted: bool) -> None:
    """`out` is to be written to, which autograd would not see; `wanted`: an operand wants it to."""
    if torch.is_grad_enabled() and (out.requires_grad or wanted):
        raise ValueError(
            f"`{name}` must be None where a gradient is wanted, as in torch's functions\n"
            "hint: `with torch.no_grad():`, or take the new tensor that comes back"
        )
