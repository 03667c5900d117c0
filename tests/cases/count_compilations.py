"""What Triton would compile for a stretch of calls: for sm_90, on "meta" tensors, nothing runs.

`python -m tests.cases.count_compilations` prints a JSON object: for each kind of call, how many
kernels a warm-up at few lengths asks the compiler for, how many calls at lengths 1 to 2000 (and
several dropout probabilities) do, and which of those the warm-up had not asked for.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_attn.ops.attention.problem import Operands, make_options
from fused_attn.ops.attention.triton import launch
from fused_attn.ops.bias_activation.triton import launch as activation_launch
from fused_attn.ops.layer_norm.triton import launch as norm_launch
from fused_attn.runtime.triton import device as triton_device


@contextlib.contextmanager
def asked() -> Iterator[dict[str, str]]:
    """Keys of what Triton wants to compile, with the name of the kernel; nothing is compiled."""
    from triton import knobs

    found: dict[str, str] = {}

    def note(*, key, fn, **rest) -> bool:
        found[f"{fn.name}: {key}"] = fn.name.split(".")[-1]
        return True  # as if it were done

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with triton_device.compiling_for(90, lambda wanted: wanted.compile()):
            yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(length: int, dropout_p: float, kind: str) -> None:
    """A training step's kernels."""
    q = meta(2, 4, length, 64)
    operands, dbias = Operands(q, q, q), None
    if kind == "bias":
        dbias = meta(1, 4, length, length, dtype=torch.float32)
        operands = operands._replace(bias=meta(1, 4, length, length))
    if kind == "mask":
        operands = operands._replace(mask=meta(2, 1, length, length, dtype=torch.bool))
    if kind == "padding":
        operands = operands._replace(key_padding_mask=meta(2, length, dtype=torch.bool))
    if dropout_p:
        operands = operands._replace(dropout_rng=meta(2, dtype=torch.int64))
    options = make_options(
        max_seqlen_q=length, max_seqlen_k=length, head_dim=64, causal=kind == "causal",
        dropout_p=dropout_p,
    )  # fmt: skip
    lse, grads = meta(2, 4, length, dtype=torch.float32), [torch.empty_like(q) for _ in range(3)]
    launch.forward(operands, options, torch.empty_like(q), lse)
    launch.backward(operands, options, torch.empty_like(q), lse, q, None, None, (*grads, dbias))


def decode(length: int, dropout_p: float, kind: str) -> None:
    q, k = meta(2, 8, 1, 64), meta(2, 2, 8 * length, 64)
    options = make_options(max_seqlen_q=1, max_seqlen_k=8 * length, head_dim=64)
    launch.forward(Operands(q, k, k), options, torch.empty_like(q), None)


def layer_norm(length: int, dropout_p: float, kind: str) -> None:
    from fused_attn.ops.layer_norm.problem import Operands, make_options

    x, weight, rows = meta(length, 768), meta(768), meta(length, dtype=torch.float32)
    rng = meta(2, dtype=torch.int64) if dropout_p else None
    residual = x if dropout_p else None
    operands = Operands(x, residual, weight, weight, rng)
    options = make_options(dims=1, dtype=x.dtype, eps=1e-5, rms=False, dropout_p=dropout_p)
    norm_launch.forward(operands, options, torch.empty_like(x), None, rows, rows)
    grads = (torch.empty_like(x), residual, weight, weight)
    norm_launch.backward(operands, options, False, rows, rows, x, None, grads)


def bias_activation(length: int, dropout_p: float, kind: str) -> None:
    from fused_attn.ops.bias_activation.problem import Operands, make_options

    x, bias = meta(length, 3072), meta(3072)
    rng = meta(2, dtype=torch.int64) if dropout_p else None
    options = make_options(activation="gelu", gated=False, dropout_p=dropout_p)
    activation_launch.forward(Operands(x, bias, rng), options, torch.empty_like(x))
    activation_launch.backward(Operands(x, bias, rng), options, x, torch.empty_like(x), bias)


CALLS: dict[str, tuple[Callable[[int, float, str], None], tuple[float, ...]]] = {
    "full": (attention, (0.0,)),
    "causal": (attention, (0.0,)),
    "padding": (attention, (0.0,)),
    "dropout": (attention, (0.1, 0.25, 0.5, 0.9, 1.0)),
    "bias": (attention, (0.0,)),
    "mask": (attention, (0.0,)),
    "decode": (decode, (0.0,)),
    "layer norm": (layer_norm, (0.0,)),
    "residual, dropout, norm": (layer_norm, (0.1, 0.5, 0.75, 1.0)),
    "bias, activation": (bias_activation, (0.0,)),
    "bias, activation, dropout": (bias_activation, (0.1, 0.5, 0.75, 1.0)),
}


# What a warm-up is asked to cover: long calls are copied by descriptors, and masks may be listed;
# multiples of 16 and others are different kernels where there is a bias or a mask.
WARM_LENGTHS = (2000, 1999, 512, 513, 32, 33)


def count(name: str, lengths: list[int]) -> dict[str, object]:
    run, probabilities = CALLS[name]
    with asked() as warm:
        for length in WARM_LENGTHS:
            run(length, probabilities[0], name)
    with asked() as found:
        for i, length in enumerate(lengths):
            run(length, probabilities[i % len(probabilities)], name)
    new = sorted(found[key] for key in found.keys() - warm.keys())
    return {"warm": len(warm), "found": len(found), "new": new}


if __name__ == "__main__":
    chosen = [int(x) for x in sys.argv[1:]] or list(range(1, 2001))
    print(json.dumps({name: count(name, chosen) for name in CALLS}))
