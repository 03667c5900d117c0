"""The backward pass of attention as a function: for those who keep out and lse themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import checks, higher_order, sequence
from .. import dispatch, operators
from ..dispatch import OPERATOR
from . import BACKENDS, call, fused, reference, values
from . import sinks as attention_sinks
from .arguments import documents, four_dimensional, heads_first, understood
from .call import Scalars
from .problem import BHLD, NO_WEIGHTS, AttentionProblem, Causal, Documents, Layout, Operands

_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


class AttentionGradients(NamedTuple):
    """Gradients in the shapes and layout of their operands; None where none was asked for."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dbias: Tensor | None
    dsinks: Tensor | None


@torch.no_grad()
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    needs: Collection[str] | None = None,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    chunk: int | None = None,
    prefix_lengths: Tensor | None = None,
    document_ids: Documents | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    layout: Layout = "bhld",
    backend: str | None = None,
) -> AttentionGradients:
    """Gradients of `attention` from its results, for engines that keep those themselves.

    In plain PyTorch, with `out, lse = attention(q, k, v, ..., return_lse=True)`::

        torch.autograd.grad((out, lse), (q, k, v, bias, sinks), (dout, dlse))

    `out` and `lse` may also be those of a longer sequence of keys, of which `k` and `v` are a part
    (ring attention, Liu et al. 2023): then dk and dv are those of the part, and the dq of all parts
    add up. What comes out cannot be differentiated again.

    Args:
        dout: (B, H, Lq, Dv), as out. dlse: (B, H, Lq), or None for zero.
        out, lse: the results of `attention` with the same arguments.
        needs: which gradients to compute, names out of "q", "k", "v", "bias" and "sinks"; all that
            there are if None.
        dropout_rng: as the forward had it; must be given where `dropout_p` is not 0.
        layout: of q, k, v, out, dout and of their gradients.
        q, k, v, causal, ..., backend: as in `attention`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: no backend (or not the one asked for) can run the call.
    """
    sequence.expect_whole("attention_backward", "`ring_attention`, which has a backward of its own")
    if layout != BHLD:
        for name, tensor in (("out", out), ("dout", dout)):
            checks.expect_rank(name, tensor, 4, "(B, Lq, H, Dv)")
        q, k, v, out = heads_first(layout, q=q, k=k, v=v, out=out)
        dout = dout.transpose(1, 2)
    if mask is not None or bias is not None:
        mask, bias, causal = understood(q, k, mask, bias, causal)
    query_ids = key_ids = None
    if document_ids is not None:
        query_ids, key_ids = documents(document_ids, q, k)
    operands = Operands(
        q,
        k,
        v,
        bias=None if bias is None else four_dimensional("bias", bias),
        mask=None if mask is None else four_dimensional("mask", mask),
        key_padding_mask=key_padding_mask,
        key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
        dropout_rng=dropout_rng if dropout_p else None,
        sinks=sinks,
        query_documents=query_ids,
        key_documents=key_ids,
        prefix_lengths=prefix_lengths,
    )
    scalars = Scalars(causal, window, softcap, scale, dropout_p, backend=backend, chunk=chunk)
    problem = call.problem_of(operands, scalars)
    given, operands = operands, call.broadcast(operands)
    values.check(operands, problem.options)
    _check_results(operands, out, lse, dout, dlse)
    if dropout_p and dropout_rng is None:
        raise ValueError("`dropout_rng` must be that of the forward where `dropout_p` is not 0")
    wanted = _wanted(operands, needs)
    grads = _gradients(operands, problem, scalars, out, lse, dout, dlse, wanted)
    if bias is not None and grads.dbias is not None:
        grads = grads._replace(dbias=grads.dbias.view(bias.shape))
    dq, dk, dv = (
        None if grad is None else grad.sum_to_size(x.shape)
        for grad, x in zip(grads[:3], given[:3], strict=True)
    )
    if layout != BHLD:
        dq, dk, dv = (None if x is None else x.transpose(1, 2) for x in (dq, dk, dv))
    return grads._replace(dq=dq, dk=dk, dv=dv)


def _gradients(
    operands: Operands,
    problem: AttentionProblem,
    scalars: Scalars,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: tuple[str, ...],
) -> AttentionGradients:
    """Of a checked call, heads first."""
    # Who cannot return lse computes its own, which that of more keys is not.
    asked = dataclasses.replace(problem, gradients=wanted, return_lse=True).without("sinks")
    backend = dispatch.select(BACKENDS, asked, scalars.backend)
    route = dispatch.route((*operands, out, lse, dout, dlse), backend)
    plain = operands._replace(sinks=None)
    settings = fused.Settings(NO_WEIGHTS, True, BHLD, backend.NAME)
    kernels = tuple(name in wanted for name in _DIFFERENTIABLE[:4])
    found: Any = [None] * 4
    if any(kernels):
        # With sinks out and lse count them, and the formulas of dq, dk and dv are the same.
        tail = (out, lse, dout, dlse, None, kernels)
        if route is dispatch.FORMULA:
            found = _by_formula(plain, problem, out, lse, dout, dlse, kernels)
        elif route is OPERATOR:
            operator = torch.ops.fused_attn.attention_backward
            found = operators.only(operator(*plain, *problem.options, *settings, *tail), kernels)
        else:
            found = fused.run_backward(plain, problem.options, settings, *tail)
    dsinks = None
    if operands.sinks is not None and "sinks" in wanted:
        dsinks = attention_sinks.gradient(out, lse, dout, dlse, operands.sinks)
    return AttentionGradients._make((*found, dsinks))


def _by_formula(
    operands: Operands,
    problem: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: tuple[bool, ...],
) -> Sequence[Tensor | None]:
    """The gradients of q, k, v and bias by differentiating the formula."""
    inputs = [
        None if x is None else x.detach().requires_grad_(want)
        for x, want in zip(operands[:4], wanted, strict=True)
    ]

    def formula(*points: Tensor | None) -> tuple[Tensor, Tensor]:
        changed: Any = dict(zip(_DIFFERENTIABLE[:4], points, strict=True))
        return reference.relative_to(lse, operands._replace(**changed), problem.options)

    delta = (dout.to(lse.dtype) * out).sum(dim=-1)
    dsums = -delta if dlse is None else dlse - delta
    return higher_order.gradients_through(formula, inputs, (dout, dsums))


def _wanted(operands: Operands, needs: Collection[str] | None) -> tuple[str, ...]:
    there = tuple(name for name in _DIFFERENTIABLE if getattr(operands, name) is not None)
    if needs is None:
        return there
    for name in needs:
        if name not in there:
            known = ", ".join(map(repr, there))
            raise ValueError(f"`needs` must name operands of the call out of {known}, got {name!r}")
    return tuple(name for name in there if name in needs)


def _check_results(
    operands: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> None:
    q, v = operands.q, operands.v
    shape = (*q.shape[:3], v.shape[3])
    for name, tensor in (("out", out), ("dout", dout)):
        checks.expect_shape(name, tensor, shape, "(B, H, Lq, Dv)")
        checks.expect_dtype(name, tensor, (q.dtype,))
        checks.expect_device(name, tensor, q.device)
    rows = {"lse": lse} if dlse is None else {"lse": lse, "dlse": dlse}
    for name, row in rows.items():
        checks.expect_shape(name, row, tuple(q.shape[:3]), "(B, H, Lq)")
        checks.expect_dtype(name, row, (fused.statistics_dtype(q),))
        checks.expect_device(name, row, q.device)
