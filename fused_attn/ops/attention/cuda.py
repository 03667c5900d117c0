"""CUDA C++ kernels for NVIDIA GPUs of compute capability 9.0 (`csrc/attention/sm90`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...runtime import cuda as cuda_runtime
from ...runtime import verified
from .problem import NO_WEIGHTS, AttentionProblem, Operands, Options, describe

NAME = "cuda"
OPERANDS = frozenset(("bias", "mask", "alibi_slopes", "dropout_rng")) | {
    *("key_padding_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k")
}
GRADIENTS = frozenset(("q", "k", "v", "bias"))

MAX_HEAD_DIM = 256
MAX_PADDED_KEYS = 32 * 1024  # of which the kernels keep a bit each in shared memory
_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (9, 0)


def why_not(problem: AttentionProblem) -> list[str]:
    reasons = cuda_runtime.why_not(problem.device, exactly=_CAPABILITY)
    if problem.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {problem.dtype}")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem, name)
        if size > MAX_HEAD_DIM:
            reasons.append(f"serves head sizes up to {MAX_HEAD_DIM}, got {name}={size}")
    if problem.options.chunk:
        reasons.append("has no kernels for `chunk`")
    if problem.packed:
        reasons += [
            f"has no kernels for `{name}` of packed batches"
            for name in ("bias", "mask")
            if name in problem.operands
        ]
    if problem.weights != NO_WEIGHTS:
        reasons.append("has no kernels for attention weights")
    return reasons


def only_by_name(problem: AttentionProblem) -> str | None:
    """What ran on no such GPU yet is nobody's default; stand-ins are for tests."""
    if cuda_runtime.emulated():
        return "the emulated device is for tests"
    return verified.why_not(
        "attention", NAME, problem.device, problem.dtype, max(problem.head_dim, problem.head_dim_v)
    )


def slower(problem: AttentionProblem) -> str | None:
    """Where torch's own functions were faster on this kind of GPU."""
    return verified.slower(
        "attention", NAME, problem.device, problem.dtype, max(problem.head_dim, problem.head_dim_v)
    )


def forward(operands: Operands, options: Options, out: Tensor, lse: Tensor | None) -> None:
    if operands.cu_seqlens_q is not None or operands.k.shape[2] == 0:
        # Rows that belong to no sequence, or see no key: the kernels do not visit them all.
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
    if operands.q.numel() == 0 or operands.k.shape[2] == 0:
        return
    arguments = (*_readable(operands), out, lse, *options)
    cuda_runtime.launch(
        "attention_forward_cuda", arguments, out.device, lambda: describe(operands, options)
    )


def backward(
    operands: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
) -> None:
    assert dweights is None, "why_not refuses weights"
    gradients = (dq, dk, dv)
    empty = operands.q.numel() == 0 or operands.k.shape[2] == 0
    if operands.cu_seqlens_q is not None or empty:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    if empty:
        return
    add_up_dq = _adds_up_dq(*gradients, dbias)
    workspace = _workspace(operands, add_up_dq)
    given = (
        *_readable(operands),
        *(cuda_runtime.for_tiles(out), lse, cuda_runtime.for_tiles(dout), dlse),
    )

    def launch(
        gradients: tuple[Tensor | None, ...], dbias: Tensor | None, first: int = 0, count: int = 0
    ) -> None:
        cuda_runtime.launch(
            "attention_backward_cuda",
            (*given, *gradients, dbias, workspace, *options, add_up_dq, first, count),
            out.device,
            lambda: describe(operands, options),
        )

    if dbias is None or not (_must_repeat() and _is_shared(dbias, operands)):
        return launch(gradients, dbias)
    if any(gradient is not None for gradient in gradients):
        launch(gradients, None)
    _add_up_bias(dbias, operands, lambda *part: launch((None, None, None), *part))


def _must_repeat() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _adds_up_dq(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dbias: Tensor | None
) -> bool:
    """Whether the kernel of dk and dv adds dq (and dbias) up as well; else they have their own.

    Five products against seven, for all head sizes, but sums in any order and a float32 buffer of
    q's size. The only place that chooses.
    """
    if _must_repeat():
        return False
    return (dq is not None or dbias is not None) and (dk is not None or dv is not None)


def _is_shared(dbias: Tensor, operands: Operands) -> bool:
    """Whether several scores have an element of the bias in common."""
    return tuple(dbias.shape) != (*operands.q.shape[:3], operands.k.shape[2])


def _add_up_bias(
    dbias: Tensor, operands: Operands, launch: Callable[[Tensor, int, int], None]
) -> None:
    """The gradient of a shared bias in a fixed order: the batch entries, and heads if they share
    it, one after the other, each in memory of its own for (Lq, Lk) that is then added to it.
    """
    batch, num_heads, seqlen_q, _ = operands.q.shape
    together = num_heads if dbias.shape[1] == num_heads else 1
    shape = (1, together, seqlen_q, operands.k.shape[2])
    for first in range(0, batch * num_heads, together):
        part = torch.zeros(shape, dtype=dbias.dtype, device=dbias.device)
        launch(part, first, together)
        to = dbias[first // num_heads if dbias.shape[0] == batch else 0][None]
        to += part.sum_to_size(to.shape)


def _readable(operands: Operands) -> tuple[Tensor | None, ...]:
    """q, k and v as the copy engine can read them, small vectors dense; the rest by strides."""
    operands = _within_padding(operands)
    first_vector = Operands._fields.index("key_lengths")
    end = Operands._fields.index("dropout_rng") + 1
    vectors = [None if x is None else x.contiguous() for x in operands[first_vector:end]]
    tiles = [cuda_runtime.for_tiles(x) for x in operands[:3]]
    return (*tiles, *operands[3:first_vector], *vectors)


def _within_padding(operands: Operands) -> Operands:
    """Padding of more keys than the kernels keep bits of, as a bool mask."""
    padding, mask = operands.key_padding_mask, operands.mask
    if padding is None or padding.shape[1] <= MAX_PADDED_KEYS:
        return operands
    padding = padding[:, None, None, :]
    mask = padding if mask is None else mask & padding
    return operands._replace(key_padding_mask=None, mask=mask)


def _workspace(operands: Operands, add_up_dq: bool) -> Tensor:
    """Memory for the row statistics, three numbers a head and query, and for the sum of dq."""
    tile, slice_columns = 64, 16
    _, num_heads, rows, head_dim = operands.q.shape
    if operands.cu_seqlens_q is not None:
        padded = (rows // tile + operands.cu_seqlens_q.shape[0]) * tile
    else:
        padded = operands.q.shape[0] * -(-rows // tile) * tile
    columns = -(-head_dim // slice_columns) * slice_columns if add_up_dq else 0
    size = (3 + columns) * num_heads * padded
    return torch.empty(size, dtype=torch.float32, device=operands.q.device)
