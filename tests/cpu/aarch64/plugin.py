"""A pytest plugin: the kernels that tests call run under qemu, as a level of 64-bit ARM.

    FUSED_ATTN_AARCH64=build/aarch64/kernels_neon python -m pytest \
        -p tests.cpu.aarch64.plugin tests/ops/layer_norm/test_api.py -k cpu

So the kernels' own tests judge them. Calls in dtypes that the level has no kernels for run here.
"""

from __future__ import annotations

import os
import subprocess
from typing import IO, Any

import torch
from torch import Tensor

from fused_attn.runtime import native

FUNCTIONS = (
    "attention_forward",
    "attention_forward_with_weights",
    "attention_backward",
    *(
        f"{operation}_{direction}"
        for operation in ("layer_norm", "bias_activation", "embedding", "linear")
        for direction in ("forward", "backward")
    ),
)
# In the order of `DType` in csrc/common/types.h.
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.bool, torch.int32, torch.int64),
)
PROGRAM = os.environ["FUSED_ATTN_AARCH64"]
WHERE_THE_RESULT_IS = {
    "layer_norm_forward": 5,
    "layer_norm_backward": 8,
    "embedding_forward": 5,
    "embedding_backward": 5,
    "bias_activation_forward": 3,
    "bias_activation_backward": 3,
}


class Kernels:
    """The compiled module, but for its kernels."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._child = subprocess.Popen(
            ("qemu-aarch64", "-cpu", "cortex-a72", PROGRAM),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.calls = dict.fromkeys(FUNCTIONS, 0)
        self.elsewhere = 0

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            return getattr(self._module, name)
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> None:
        flat = [x for a in arguments for x in (a if isinstance(a, tuple) else (a,))]
        dtype = flat[WHERE_THE_RESULT_IS.get(name, 0)].dtype
        if dtype == torch.float64:
            self.elsewhere += 1
            getattr(self._module, name)(*arguments)
            return
        self.calls[name] += 1
        self._run(name, flat)

    def _run(self, name: str, arguments: list[Any]) -> None:
        blocks: dict[int, Tensor] = {}
        lines = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                memory = _memory(argument)
                blocks.setdefault(memory.data_ptr(), memory)
                block = list(blocks).index(memory.data_ptr())
                lines.append(_tensor_line(argument, block))
            else:
                lines.append(_line(argument))
        stdin, stdout = self._pipes()
        stdin.write(f"{name} {len(blocks)} {len(arguments)}\n".encode())
        for memory in blocks.values():
            stdin.write(f"{len(memory)}\n".encode() + memory.numpy().tobytes())
        stdin.write(("\n" + "\n".join(lines) + "\n").encode())
        stdin.flush()
        for memory in blocks.values():
            data = stdout.read(len(memory))
            if len(data) != len(memory):
                raise RuntimeError(f"{PROGRAM} ended within {name}: {self._child.wait()}")
            if data:
                memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        return self._child.stdin, self._child.stdout


def _memory(tensor: Tensor) -> Tensor:
    """All bytes that a tensor's storage holds, as a tensor."""
    storage = tensor.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensor_line(tensor: Tensor, block: int) -> str:
    offset = tensor.storage_offset() * tensor.element_size()
    sizes = (*tensor.shape, *tensor.stride())
    words = ("t", block, offset, DTYPES.index(tensor.dtype), tensor.dim(), *sizes)
    return " ".join(map(str, words))


def _line(argument: Any) -> str:
    if argument is None:
        return "n"
    if isinstance(argument, str):
        return f"s {argument or '-'}"
    if isinstance(argument, float):
        return f"f {argument!r}"
    return f"i {int(argument)}"


KERNELS = Kernels(native.module())
native.module = lambda: KERNELS  # type: ignore[assignment,return-value]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ran = ", ".join(f"{name} {count}" for name, count in KERNELS.calls.items() if count)
    terminalreporter.write_line(
        f"under qemu: {sum(KERNELS.calls.values())} calls ({ran}); here: {KERNELS.elsewhere}"
    )
