"""Calls that between them launch every shipped configuration of the attention kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_attn.ops.attention.problem import Causal, Operands, make_options
from fused_attn.ops.attention.triton import config, launch

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Tiles of a bias, a mask and the gradient of the weights are copied 16 bytes at a time where the
# length is a multiple of 16, and element by element where it is odd: another kernel.
_LENGTH, _ODD = 2048, 2047


def calls(arch: int | str, everything: bool) -> dict[str, Callable[[], None]]:
    """Name -> a function that launches forward and backward; on "meta" tensors.

    Args:
        everything: all combinations on each architecture; otherwise all of bfloat16 and head size
            128 on sm_90, and elsewhere what differs most.
    """
    kinds = ("full", "causal", "bias", "mask", "dropout", "weights", "positions", "everything")
    with_odd = ("bias", "mask", "weights", "everything")
    result: dict[str, Callable[[], None]] = {}
    for dtype in ("bf16", "fp32"):
        for head_dim in (64, 128, 256):
            for kind in kinds:
                if everything or _is_telling(arch, dtype, head_dim, kind):
                    name = f"attention {dtype} {head_dim} {kind}"
                    result[name] = functools.partial(_run, _DTYPES[dtype], head_dim, kind, _LENGTH)
                    if kind in with_odd:
                        run = functools.partial(_run, _DTYPES[dtype], head_dim, kind, _ODD)
                        result[f"{name} odd"] = run
            for kind, rows in (("", 4), ("", config.MAX_DECODE_ROWS), (" masked", 4)):
                if everything or (dtype == "bf16" and head_dim == 128 and kind == "" and rows == 4):
                    run = functools.partial(_decode, _DTYPES[dtype], head_dim, rows, kind != "")
                    result[f"attention {dtype} {head_dim} decode {rows}{kind}"] = run
    return result


def _is_telling(arch: int | str, dtype: str, head_dim: int, kind: str) -> bool:
    """Whether a call belongs to the sample that every test run compiles."""
    if dtype == "fp32":  # what registers are scarcest for
        return arch == 90 and kind == ("causal" if head_dim == 64 else "everything")
    if head_dim == 128 and arch == 90:
        return kind != "weights"  # everything has them
    return kind in ("causal", "everything") and (head_dim == 128 or arch == 90)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run(dtype: torch.dtype, head_dim: int, kind: str, length: int) -> None:
    q = _meta(2, 8, length, head_dim, dtype=dtype)
    operands, causal, softcap, dropout_p = Operands(q, q, q), False, 0.0, 0.0
    chunk = None
    dbias = dweights = None
    if kind != "full":
        causal = True
    if kind == "bias":
        operands = operands._replace(bias=_meta(1, 8, length, length, dtype=dtype))
        dbias = _meta(1, 8, length, length)
    if kind == "weights":
        dweights = _meta(2, 1, length, length)
    if kind == "mask":
        operands = operands._replace(mask=_meta(2, 1, length, length, dtype=torch.bool))
    if kind == "dropout":
        operands, dropout_p = operands._replace(dropout_rng=_meta(2, dtype=torch.int64)), 0.1
    if kind == "positions":
        ids = _meta(2, length, dtype=torch.int64)
        lengths = _meta(2, dtype=torch.int64)
        operands = operands._replace(query_documents=ids, key_documents=ids, prefix_lengths=lengths)
        chunk = length // 2
    if kind == "everything":
        operands = operands._replace(
            k=_meta(2, 4, length, head_dim, dtype=dtype),
            v=_meta(2, 4, length, head_dim, dtype=dtype),
            bias=_meta(1, 8, length, length, dtype=dtype),
            mask=_meta(2, 1, length, length, dtype=torch.bool),
            key_padding_mask=_meta(2, length, dtype=torch.bool),
            alibi_slopes=_meta(8),
            dropout_rng=_meta(2, dtype=torch.int64),
        )
        softcap, dropout_p = 30.0, 0.1
        dbias = _meta(1, 8, length, length)
        dweights = _meta(2, 1, length, length)
    _launch_all(operands, causal, softcap, dropout_p, chunk, dweights, dbias)


def _launch_all(
    operands: Operands,
    causal: Causal,
    softcap: float,
    dropout_p: float,
    chunk: int | None,
    dweights: Tensor | None,
    dbias: Tensor | None,
) -> None:
    q, k, v = operands[:3]
    options = make_options(
        max_seqlen_q=q.shape[2],
        max_seqlen_k=q.shape[2],
        head_dim=q.shape[3],
        causal=causal,
        softcap=softcap,
        dropout_p=dropout_p,
        chunk=chunk,
    )
    out, lse = torch.empty_like(q), _meta(*q.shape[:3])
    launch.forward(operands, options, out, lse)
    if dweights is not None:
        launch.weights(operands, options, lse, dweights, True)
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias)
    launch.backward(operands, options, out, lse, out, None, dweights, grads)


def _decode(dtype: torch.dtype, head_dim: int, rows: int, masked: bool) -> None:
    """`rows` queries share a key head; as many splits as there may be, or tiles that are listed."""
    batch, length = (64, _LENGTH) if masked else (2, config.MAX_SPLITS * 256)
    q = _meta(batch, 2 * rows, 1, head_dim, dtype=dtype)
    k = _meta(batch, 2, length, head_dim, dtype=dtype)
    options = make_options(max_seqlen_q=1, max_seqlen_k=length, head_dim=head_dim)
    operands = Operands(q, k, k, key_lengths=_meta(batch, dtype=torch.int64))
    if masked:
        operands = operands._replace(mask=_meta(batch, 1, 1, length, dtype=torch.bool))
    launch.forward(operands, options, torch.empty_like(q), _meta(*q.shape[:3]))
