"""The compile-time numbers of a kernel."""

from __future__ import annotations

from typing import Any

from triton import language as tl

from ....runtime.triton import device as triton_device


class KernelConfig(str):
    """The compile-time numbers of a kernel, as the attributes of one constant.

    It is its own text, because Triton's hooks write the constants of a kernel as JSON.
    """

    PAIRS = tl.constexpr(False)  # whether there are functions of pairs
    CLASSED = tl.constexpr(False)  # whether their tiles are classified beforehand

    def __new__(cls, **values: Any) -> KernelConfig:
        texts = [f"{k}={v.__name__ if callable(v) else v}" for k, v in values.items()]
        config = super().__new__(cls, ", ".join(texts))
        for name, value in values.items():
            # The interpreter takes a constant within a constant for what it is.
            bare = isinstance(value, KernelConfig) or callable(value)
            bare = bare and triton_device.interpreted()
            setattr(config, name, value if bare else tl.constexpr(value))
        return config

    def __repr__(self) -> str:
        return f"KernelConfig({self})"
