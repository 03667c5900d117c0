"""Calls whose tensors lie against a protected page: one byte too far ends the process.

`python -m tests.cases.guard_pages SIDE BACKEND OPERATION ...` runs the cases of an operation,
forward and backward. Every operand, every gradient that comes in and everything that the package
allocates ends at the end of a mapping whose next page is protected (SIDE "end"), or begins where
one begins ("front"). The name of a case is printed before it runs: the last is the one that failed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import math
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.cases import without_gpu

without_gpu.arrange()

# ruff: noqa: E402
from fused_attn.runtime.triton import device as triton_device
from tests.cases import attention, bias_activation, embedding, layer_norm, linear

ROOT = Path(__file__).parents[2]

_LIBC = ctypes.CDLL(None, use_errno=True)
_EMPTY, _EMPTY_LIKE, _ZEROS = torch.empty, torch.empty_like, torch.zeros
_MAPPINGS: list[mmap.mmap] = []


def place(shape: tuple[int, ...], dtype: torch.dtype, side: str) -> Tensor:
    """Uninitialised memory with a protected page behind it, or before it."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return _EMPTY(shape, dtype=dtype)
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    mapping = mmap.mmap(-1, room + 2 * page)
    _MAPPINGS.append(mapping)  # tensors do not keep it
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for guard in (base, base + page + room):
        if _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    start = base + page + (room - size if side == "end" else 0)
    memory = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def moved(x: Tensor, side: str) -> Tensor:
    """`x` with its strides, against a guard page: its first and last elements touch the ends."""
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    if x.numel() == 0:
        return x
    copy = place((span,), x.dtype, side).as_strided(x.shape, x.stride())
    copy.copy_(x.detach())
    return copy.requires_grad_(x.requires_grad)


def guard_allocations(side: str) -> None:
    """From now on Python's allocations of whole tensors are against guard pages too."""

    def empty(*shape, dtype=torch.float32, device=None, **rest):
        if rest or (device is not None and torch.device(device).type != "cpu"):
            return _EMPTY(*shape, dtype=dtype, device=device, **rest)
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return place(tuple(sizes), dtype, side)

    def empty_like(x, *, dtype=None, memory_format=torch.preserve_format, **rest):
        plain = _EMPTY_LIKE(x, dtype=dtype, memory_format=memory_format, **rest)
        return moved(plain, side) if type(x) is Tensor and x.device.type == "cpu" else plain

    torch.empty, torch.empty_like = empty, empty_like
    torch.zeros = lambda *shape, **rest: moved(_ZEROS(*shape, **rest), side)


def attention_cases(backend: str) -> Iterator[tuple[str, Callable, dict[str, Tensor]]]:
    kinds = attention.Case
    everything = {
        "num_heads": 4, "num_heads_kv": 2, "bias": "bhqk", "mask": "bhqk", "padding": "holes",
        "alibi": True, "softcap": 5.0, "dropout_p": 0.2, "weights": "per_head",
    }  # fmt: skip
    cases = [
        kinds(1, 1, 1, 128, 70, 16, bias="bhqk", mask="bhqk", weights="per_head"),
        kinds(1, 2, 1, 33, 65, 13, 20, bias="1hqk", mask="b11k", weights="average"),
        kinds(2, 2, 2, 70, 33, 8, mask="b1qk", causal=True),
        kinds(2, 2, 1, 65, 130, 24, causal="lower_right", padding="mask"),
        kinds(1, 2, 2, 40, 90, 72, window=(20, 5), padding="lengths", layout="blhd"),
        kinds(
            2,
            4,
            2,
            37,
            45,
            9,
            5,
            causal=True,
            **{k: v for k, v in everything.items() if "heads" not in k},
        ),
        kinds(1, 1, 1, 1, 1, 1, bias="bhqk", mask="bhqk"),
        kinds(1, 2, 1, 7, 3, 17, bias="11qk", layout="strided"),
        kinds(2, 2, 1, 1, 600, 16, 9, bias="bhqk", mask="b11k", padding="lengths"),
        kinds(1, 4, 1, 3, 530, 20, causal="lower_right", dropout_p=0.3),
        kinds(1, 1, 1, 100, 31, 33, bias="11q1", weights="average", dropout_p=0.1),
        kinds(2, 2, 1, 70, 131, 8, causal=True, documents="mixed", prefix=True, chunk=40),
    ]
    for dtype in dtypes_of(backend):
        for case in cases:
            tensors = case.tensors(dtype, requires_grad=case.seqlen_k < 500)
            yield (
                f"{dtype} {case}",
                functools.partial(attention.run_backend, case, backend),
                tensors,
            )


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    if backend == "triton":
        return (torch.float32, torch.float16)
    return (torch.float32, torch.bfloat16, torch.float16)


def packed_cases(backend: str) -> Iterator[tuple[str, Callable, dict[str, Tensor]]]:
    import fused_attn

    lengths = {"max_seqlen_q": 40, "max_seqlen_k": 40, "causal": True}

    def run(ids: Tensor, key_ids: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
        return (
            fused_attn.attention_varlen(
                **tensors, **lengths, document_ids=(ids, key_ids), backend=backend
            ),
        )

    for dtype in dtypes_of(backend):
        q, k, v = (torch.randn(51, 2, 13).to(dtype).requires_grad_() for _ in range(3))
        cu = torch.tensor([0, 1, 1, 41, 51], dtype=torch.int32)
        tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu.clone()}
        tensors |= {"ids": torch.arange(51) // 5, "key_ids": torch.arange(51) // 5}
        yield f"{dtype} packed", run, tensors


def norm_cases(backend: str) -> Iterator[tuple[str, Callable, dict[str, Tensor]]]:
    widths = (1, 13, 48, 129, 1030) if backend != "triton" else (1, 13, 129, 8200)
    for dtype in dtypes_of(backend):
        for width in widths:
            for more in (
                {},
                {"residual": "pre", "dropout_p": 0.2},
                {"rms": True, "strides": "every other"},
            ):
                case = layer_norm.Case(shape=(5, width), dtype=dtype, **more)
                yield str(case), functools.partial(case.run, backend), case.tensors()


def activation_cases(backend: str) -> Iterator[tuple[str, Callable, dict[str, Tensor]]]:
    for dtype in dtypes_of(backend):
        for width in (1, 13, 65, 515):
            for activation in bias_activation.PLAIN:
                for gated in (False, True):
                    case = bias_activation.Case(
                        activation, (5, width), dtype, gated, dropout_p=0.2 * gated
                    )
                    run = functools.partial(case.run, backend)
                    yield str(case), lambda run=run, **x: (run(**x),), case.tensors()


def embedding_cases(backend: str) -> Iterator[tuple[str, Callable, dict[str, Tensor]]]:
    for dtype in dtypes_of(backend):
        for width in (1, 13, 48, 129):
            for table in (None, "counted", "given"):
                case = embedding.Case(width=width, dtype=dtype, table=table, dropout_p=0.2)
                yield str(case), functools.partial(case.run, backend), case.tensors()


def linear_cases(backend: str) -> Iterator[tuple[str, Callable, dict[str, Tensor]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, width_in, width_out in ((1, 1, 1), (5, 13, 17), (97, 259, 33), (7, 64, 515)):
            case = linear.Case((rows,), width_in, width_out, dtype)
            yield str(case), functools.partial(case.run, backend), case.tensors()
            case = linear.Case((rows,), width_in, width_out, dtype, strides="columns")
            yield str(case), functools.partial(case.run, backend), case.tensors()
            case = linear.Case((rows,), width_in, width_out, dtype, activation="silu", gated=True,
                               residual=True, dropout_p=0.3)  # fmt: skip
            yield str(case), functools.partial(case.run, backend), case.tensors()


OPERATIONS = {
    "attention": attention_cases,
    "packed": packed_cases,
    "layer_norm": norm_cases,
    "bias_activation": activation_cases,
    "embedding": embedding_cases,
    "linear": linear_cases,
}


def run_all(side: str, backend: str, operations: list[str]) -> int:
    """How many cases ran; each operation has some."""
    torch.manual_seed(0)
    of_each = [list(OPERATIONS[name](backend)) for name in operations]
    assert all(of_each), "an operation without cases"
    if triton_device.interpreted() and backend == "triton":  # slow: half of them at either side
        of_each = [cases[side == "front" :: 2] for cases in of_each]
    cases = [case for cases in of_each for case in cases]
    guard_allocations(side)
    for name, run, tensors in cases:
        print(name, flush=True)
        guarded = {key: moved(x, side) for key, x in tensors.items()}
        outputs = [x for x in run(**guarded) if x is not None]
        wanted = [x for x in guarded.values() if x.requires_grad]
        if wanted:
            differentiable = [x for x in outputs if x.requires_grad]
            given = [moved(torch.randn(x.shape).to(x.dtype), side) for x in differentiable]
            torch.autograd.grad(differentiable, wanted, given, allow_unused=True)
    return len(cases)


def run_against_guards(side: str, backend: str, *operations: str, **environment: str) -> None:
    """Run the cases in a process of their own; fails with the case that ended it."""
    command = [sys.executable, "-m", "tests.cases.guard_pages", side, backend, *operations]
    done = _run(command, environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert int(done.stdout.splitlines()[-1].split()[0]) > 0


def dies(code: str) -> bool:
    """Whether `code`, in which this module's names are known, is ended by a guard page."""
    done = _run([sys.executable, "-c", f"from tests.cases.guard_pages import *\n{code}"], {})
    assert done.returncode in (0, -signal.SIGSEGV), done.stderr
    return done.returncode != 0


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    without_gpu.import_kernels()
    without_gpu.make_interpreter_faster()
    print(run_all(sys.argv[1], sys.argv[2], sys.argv[3:]), "cases", flush=True)
